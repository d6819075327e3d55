"""A bundle, or engines, as a model of lmms-eval: written to lmms-eval 0.7's chat interface.

    python -m lmms_eval --model hawk_trt --model_args bundle=artifacts/7b,keep_ratio=0.2 --tasks mme,textvqa_val

lmms-eval finds it through an entry point of this package. It brings datasets, prompts and metrics; torch is its
need, not this file's. One process; --batch_size answers so many questions side by side.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_eval.api.model import lmms

from hawk_trt import Pipeline, PruningConfig, SamplingConfig
from hawk_trt.apps.harness.answering import Answering
from hawk_trt.errors import InvalidInput
from hawk_trt.pruning.head_weights import read_head_weights

if TYPE_CHECKING:
    from hawk_trt.request import Message

_MAX_NEW_TOKENS = 128


class HawkTrt(lmms):
    """The model. Its arguments are what --model_args names."""

    is_simple = False

    def __init__(
        self,
        bundle: str,
        keep_ratio: float = 0.2,
        selector: str = "hawk",
        query: str = "paper",
        quota: str = "global",
        head_weights: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float | None = None,
        max_frames: int | None = None,
        system_prompt: str | None = None,
        target: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # noqa: ARG002 - lmms-eval passes it to every model
    ) -> None:
        """Load a bundle, or engines.

        The names mean what they mean in PruningConfig, Pipeline.load and `hawk-trt run`; head_weights is a file of
        weights, system_prompt comes before every conversation that has none. batch_size: questions answered side by
        side; "auto" is one.

        Raises:
            HawkError: it cannot be loaded, or an option cannot be used.
        """
        super().__init__()
        weights = None if head_weights is None else read_head_weights(Path(head_weights)).values
        pruning = PruningConfig(
            keep_ratio=float(keep_ratio), head_weights=weights, selector=selector, query=query, quota=quota
        )
        pipe = Pipeline.load(bundle, device=device, target=target)
        self._answering = Answering(pipe, pruning, min_pixels, max_pixels)
        self._video = {name: value for name, value in (("fps", fps), ("max_frames", max_frames)) if value is not None}
        self._system = system_prompt
        self._batch_size = int(batch_size) if str(batch_size).isdecimal() else 1

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer each request, in their order; neighbours with equal settings side by side."""
        answers: list[str] = []
        for settings, group in groupby(requests, key=lambda request: request.args[2]):
            members = list(group)
            for start in range(0, len(members), self._batch_size):
                batch = members[start : start + self._batch_size]
                texts = self._answering.answer([self._messages(request) for request in batch], *_asked(settings))
                for request, text in zip(batch, texts, strict=True):
                    self.cache_hook.add_partial("generate_until", (request.args[0], settings), text)
                answers += texts
        print(self._answering.summary(), file=sys.stderr)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: the tasks of the paper generate."""
        raise NotImplementedError(f"hawk_trt generates; {len(requests)} requests ask for log-likelihoods instead")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: the tasks of the paper have one round."""
        raise NotImplementedError(f"hawk_trt answers one round; {len(requests)} requests have several")

    def _messages(self, request: Any) -> "list[Message]":  # noqa: ANN401 - lmms-eval ships no types
        _, make_messages, _, doc_id, task, split = request.args
        given = make_messages(self.task_dict[task][split][doc_id])
        messages: list[Message] = [
            {"role": turn["role"], "content": list(_items(turn["content"], self._video))} for turn in given
        ]
        if self._system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system})
        return messages


def _items(content: Any, video: Mapping[str, float]) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - a text or a list of mappings
    """The items of a turn, from lmms-eval's form: {"type": "image", "url": ...}; video: what a video takes besides."""
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = item["type"]
        if kind == "text":
            yield {"type": "text", "text": item["text"]}
        elif kind == "image":
            yield {"type": "image", "image": item["url"]}
        elif kind == "video" and item.get("start_time") is None and item.get("end_time") is None:
            yield {"type": "video", "video": item["url"], **video}
        else:
            what = "a part of a video" if kind == "video" else kind
            raise InvalidInput(f"messages: got {what}, expected text, images and whole videos")


def _asked(settings: Mapping[str, Any]) -> tuple[int, SamplingConfig, list[str]]:
    """Longest answer, sampling and stop strings, from a task's generation_kwargs."""
    if (settings.get("num_beams") or 1) > 1:
        raise InvalidInput(f"num_beams: got {settings['num_beams']}, expected 1: hawk_trt has no beam search")
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
    sampling = SamplingConfig(
        temperature, float(settings.get("top_p") or 1.0), int(settings.get("top_k") or 0), settings.get("seed", 0)
    )
    until = settings.get("until") or []
    stop = [until] if isinstance(until, str) else list(until)
    return int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS), sampling, stop
