"""A bundle, or engines, as a model of VLMEvalKit: written to the interface of its BaseModel.

    python -m hawk_trt.apps.harness.vlmevalkit BUNDLE --vlmevalkit DIR --keep-ratio 0.2 -- --data MME TextVQA_VAL

VLMEvalKit is not on the package registry: DIR is a clone of it, with its requirements installed. What stands behind
-- goes to its run.py, which brings datasets, prompts and metrics. torch is its need, not this file's.
"""

import argparse
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_trt.apps.cli import options
from hawk_trt.apps.harness.answering import Answering
from hawk_trt.errors import HawkError, InvalidInput

if TYPE_CHECKING:
    from hawk_trt.request import Message


def model_class() -> type[Any]:
    """The model class; VLMEvalKit must be importable.

    Raises:
        InvalidInput: it is not.
    """
    try:
        from vlmeval.vlm.base import BaseModel
    except ImportError as error:
        raise InvalidInput(
            f"VLMEvalKit cannot be imported ({error}). Clone it, install its requirements, and name the clone: "
            "--vlmevalkit DIR"
        ) from error

    class HawkTrt(BaseModel):
        """Answers with a pipeline that is loaded already."""

        INTERLEAVE = True
        VIDEO_LLM = True

        def __init__(
            self,
            answering: Answering,
            max_new_tokens: int,
            system: str | None = None,
            fps: float | None = None,
            max_frames: int | None = None,
        ) -> None:
            super().__init__()
            self.answering = answering
            self._max_frames = max_frames
            self._max_new_tokens = max_new_tokens
            self._system = system
            # VLMEvalKit sets fps to a data set's own; a fixed number of frames is not this model's way
            self.fps = fps
            self.nframe = None

        def generate_inner(
            self,
            message: Sequence[Mapping[str, Any]],
            dataset: str | None = None,  # noqa: ARG002 - all data sets are asked alike
        ) -> str:
            """Answer one question of a data set."""
            messages = to_messages(message, self._system, self.fps, self._max_frames)
            return self.answering.answer([messages], self._max_new_tokens)[0]

    return HawkTrt


def to_messages(
    parts: Sequence[Mapping[str, Any]], system: str | None, fps: float | None, max_frames: int | None
) -> "list[Message]":
    """Chat messages from VLMEvalKit's list of {"type": ..., "value": ..., "role": ...}.

    Args:
        parts: in their order; a part without a role is the user's.
        system: message before them, where they bring none.
        fps: frames a second taken from videos, None for the family's.
        max_frames: most frames taken from a video, None for the default.

    Raises:
        InvalidInput: a type that is not text, image or video.
    """
    messages: list[Message] = []
    for part in parts:
        kind, value, role = part["type"], part["value"], part.get("role", "user")
        if kind not in ("text", "image", "video"):
            raise InvalidInput(f"message: got type {kind!r}, expected text, image or video")
        item = {"type": kind, kind: value}
        if kind == "video":
            item |= {name: number for name, number in (("fps", fps), ("max_frames", max_frames)) if number}
        if not messages or messages[-1]["role"] != role:
            messages.append({"role": role, "content": []})
        messages[-1]["content"].append(item)
    if system is not None and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def main(arguments: Sequence[str] | None = None) -> int:
    """Load the bundle, name it to VLMEvalKit, and run its run.py; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    own = given.index("--") if "--" in given else len(given)
    args = _parser().parse_args(given[:own])
    script = args.vlmevalkit / "run.py"
    try:
        if not script.is_file():
            raise InvalidInput(f"{script}: no such file, expected a clone of VLMEvalKit with --vlmevalkit")
        sys.path.insert(0, str(args.vlmevalkit.resolve()))
        made = model_class()
        with options.open_pipeline(args) as pipe:
            pruning = options.selected_pruning(args, args.keep_ratio)
            answering = Answering(pipe, pruning, args.min_pixels, args.max_pixels)
            model = made(answering, args.max_new_tokens, args.system, args.fps, args.max_frames)
            from vlmeval.config import supported_VLM

            supported_VLM[args.name] = lambda: model
            sys.argv = [str(script), "--model", args.name, *given[own + 1 :]]
            runpy.run_path(str(script), run_name="__main__")
            print(answering.summary(), file=sys.stderr)
    except HawkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hawk_trt.apps.harness.vlmevalkit",
        usage="%(prog)s BUNDLE --vlmevalkit DIR [options] -- --data MME [options of VLMEvalKit's run.py]",
        description="Run VLMEvalKit's benchmarks on a bundle or on engines.",
        allow_abbrev=False,
    )
    options.add_pipeline_options(parser)
    parser.add_argument("--vlmevalkit", type=Path, required=True, metavar="DIR", help="a clone of VLMEvalKit")
    parser.add_argument("--name", default="hawk-trt", help="of the model in its results (default: %(default)s)")
    group = parser.add_argument_group("pruning")
    group.add_argument("--keep-ratio", type=float, default=0.2, help="share of visual tokens (default: %(default)s)")
    options.add_pruning_options(group)
    options.add_selector_options(group)
    group = parser.add_argument_group("prompt")
    group.add_argument("--system", help="a system message where the data set brings none")
    group.add_argument("--min-pixels", type=int, help="enlarge smaller images to this area (default: the checkpoint's)")
    group.add_argument("--max-pixels", type=int, help="shrink larger images to this area (default: the checkpoint's)")
    group.add_argument("--fps", type=float, help="frames a second of videos (default: the family's)")
    group.add_argument("--max-frames", type=int, metavar="N", help="most frames of a video (default: 768)")
    group.add_argument("--max-new-tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
