"""A bundle, or engines, as a model of VLMEvalKit: written to the interface of its BaseModel.

VLMEvalKit is not on the package registry: it is a clone of its repository, with its requirements installed. Its run.py
brings datasets, prompts and metrics. torch is its need, not this file's.
"""

import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_trt.apps.harness.answering import Answering
from hawk_trt.errors import InvalidInput

if TYPE_CHECKING:
    from hawk_trt.request import Message


def model_class(clone: Path) -> type[Any]:
    """The model class, made with VLMEvalKit's own base from the folder of its clone.

    Raises:
        InvalidInput: VLMEvalKit is not there, or cannot be imported.
    """
    script = clone / "run.py"
    if not script.is_file():
        raise InvalidInput(f"{script}: no such file, expected a clone of VLMEvalKit with --vlmevalkit")
    sys.path.insert(0, str(clone.resolve()))
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
            self._answering = answering
            self._max_new_tokens = max_new_tokens
            self._system = system
            self._max_frames = max_frames
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
            return self._answering.answer([messages], self._max_new_tokens)[0]

    return HawkTrt


def run(clone: Path, name: str, model: object, arguments: Sequence[str]) -> None:
    """Name a model of model_class to VLMEvalKit, and run its run.py on it with these arguments."""
    from vlmeval.config import supported_VLM

    supported_VLM[name] = lambda: model
    sys.argv = [str(clone / "run.py"), "--model", name, *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def to_messages(
    parts: Sequence[Mapping[str, Any]], system: str | None, fps: float | None, max_frames: int | None
) -> "list[Message]":
    """Chat messages from VLMEvalKit's list of {"type": ..., "value": ..., "role": ...}.

    A part without a role is the user's. The system message comes before parts that bring none; fps and max_frames go
    to every video.

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
