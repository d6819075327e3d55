"""A bundle, or engines, as a model of VLMEvalKit: written to the interface of its BaseModel.

VLMEvalKit is ms-vlmeval or nvidia-vlmeval on the package registry, or a clone of its repository. Its run.py brings data
sets, prompts and metrics. torch is its need, not this file's. Prompts are made as its class for Qwen2.5-VL makes them:
all parts of a question are the user's, whatever role they name, and a data set sets the frames of its videos.
"""

import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawk_trt.apps.harness.answering import Answering
from hawk_trt.errors import HawkError, InvalidInput
from hawk_trt.inputs.video_file import index_file
from hawk_trt.request import Request

if TYPE_CHECKING:
    from hawk_trt.request import Message

# What VLMEvalKit looks for in an answer when it goes on with a run: it asks such questions again.
_FAILED = "Failed to obtain answer via API. "
# In place of the smallest size that was asked for: a data set's own rule in the class for Qwen2.5-VL.
_OCRBENCH_MIN_PIXELS = 10 * 10 * 28 * 28
_SIZES = ("min_pixels", "max_pixels", "resized_height", "resized_width")
_SETTINGS = {
    "text": (),
    "image": _SIZES,
    "video": (*_SIZES, "total_pixels", "fps", "nframes", "min_frames", "max_frames", "video_start", "video_end"),
}


def model_class() -> type[Any]:
    """The model class, made with VLMEvalKit's own base."""
    try:
        from vlmeval.vlm.base import BaseModel
    except ImportError as error:
        raise InvalidInput(
            f"VLMEvalKit cannot be imported ({error}). Install it (pip install ms-vlmeval), or clone it, install its "
            "requirements, and run this in the clone"
        ) from error

    class HawkTrt(BaseModel):
        """Answers with a pipeline that is loaded already.

        Attributes:
            fps, nframe: of videos. VLMEvalKit sets them to the data set's, and the one that it has not to None.
        """

        INTERLEAVE = True
        VIDEO_LLM = True

        def __init__(
            self,
            answering: Answering,
            max_new_tokens: int = 2048,
            *,
            fps: float | None = None,
            **of_videos: Any,  # noqa: ANN401 - numbers, each of its kind
        ) -> None:
            super().__init__()
            self._answering = answering
            self._max_new_tokens = max_new_tokens
            self._of_videos = of_videos
            self.fps: float | None = fps or 2
            self.nframe: int | None = 128

        def generate_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            """Answer one question of a data set."""
            return self._say([{"role": "user", "content": message}], dataset)

        def chat_inner(self, message: Sequence[Mapping[str, Any]], dataset: str | None = None) -> str:
            """Answer the last turn of a conversation."""
            return self._say(message, dataset)

        def _say(self, turns: Sequence[Mapping[str, Any]], dataset: str | None) -> str:
            question = partial(self._request, turns, dataset)
            (answer,) = self._answering.answer([question], str(dataset))
            return f"{_FAILED}{answer}" if isinstance(answer, HawkError) else answer.text or ""

        def _request(self, turns: Sequence[Mapping[str, Any]], dataset: str | None) -> Request:
            sampled = {"fps": self.fps} if self.fps else {"nframes": self.nframe}
            messages = to_messages(turns, dataset, self._of_videos | sampled)
            return Request(messages, max_new_tokens=self._max_new_tokens)

    return HawkTrt


def run(name: str, model: object, arguments: Sequence[str]) -> None:
    """Name a model of model_class to VLMEvalKit, and run its run.py on it with these arguments."""
    import vlmeval
    from vlmeval.config import supported_VLM

    def make(*, use_vllm: bool = False) -> object:
        """VLMEvalKit asks models by some names (Qwen2.5-VL) whether vLLM shall run them."""
        if use_vllm:
            raise InvalidInput("--use-vllm: hawk_trt answers by itself; leave it out")
        return model

    supported_VLM[name] = make
    sys.argv = ["run.py", "--model", name, *arguments]
    if find_spec("vlmeval.run") is not None:
        runpy.run_module("vlmeval.run", run_name="__main__")
        return
    script = Path(vlmeval.__file__).parent.parent / "run.py"  # a clone has it beside the package
    if not script.is_file():
        raise InvalidInput(f"{script}: no such file, expected VLMEvalKit from pip (ms-vlmeval), or its clone")
    runpy.run_path(str(script), run_name="__main__")


def to_messages(
    turns: Sequence[Mapping[str, Any]], dataset: str | None, of_videos: Mapping[str, Any]
) -> "list[Message]":
    """Chat messages from VLMEvalKit's turns, whose content is a list of {"type": ..., "value": ...}.

    The settings that a part has go on with it; of_videos are those of a video that does not have them.
    """
    messages: list[Message] = []
    for turn in turns:
        items: list[dict[str, Any]] = []
        for part in turn["content"]:
            kind, value = part["type"], part["value"]
            if kind not in _SETTINGS:
                raise InvalidInput(f"message: got type {kind!r}, expected text, image or video")
            item = {kind: value, "type": kind} | {key: part[key] for key in _SETTINGS[kind] if key in part}
            if kind == "image" and dataset == "OCRBench" and of_videos.get("min_pixels"):
                item.setdefault("min_pixels", _OCRBENCH_MIN_PIXELS)
            if kind == "video":
                item = {key: of_videos.get(key) for key in _SETTINGS[kind]} | item
                if "nframes" in part or "fps" in part:  # one of them says how a video is sampled
                    item |= {key: part.get(key) for key in ("fps", "nframes")}
                if item["nframes"]:
                    there = min(index_file(Path(value)).total, item["nframes"])  # down to an even number
                    item |= {"nframes": max(there // 2 * 2, 2), "max_frames": None}
            items.append({key: setting for key, setting in item.items() if setting is not None})
        messages.append({"role": turn["role"], "content": items})
    return messages
