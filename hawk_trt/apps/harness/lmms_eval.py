"""A bundle, or engines, as a model of lmms-eval: written to lmms-eval 0.7's chat interface.

    python -m lmms_eval --model hawk_trt --model_args bundle=artifacts/7b,keep_ratio=0.2 --tasks mme,textvqa_val

lmms-eval finds it through an entry point of this package. It brings datasets, prompts and metrics; torch is its
need, not this file's. --batch_size answers so many questions side by side; under torchrun each process has its own GPU.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from tqdm import tqdm

from hawk_trt import Pipeline, PruningConfig, Request, Result, SamplingConfig
from hawk_trt.apps.harness.answering import Answering, device_of_rank
from hawk_trt.errors import InvalidInput
from hawk_trt.pruning.head_weights import read_head_weights

if TYPE_CHECKING:
    from hawk_trt.request import Message

_MAX_NEW_TOKENS = 128
# lmms-eval's own default, in every task that names no stop strings: it would end an answer at its first empty line.
_DEFAULT_UNTIL = ["\n\n"]


@dataclass
class KeptTokens(TokenCounts):
    """Token counts of an answer, with the visual tokens of its prompt and those kept."""

    visual_tokens: int | None = None
    kept_visual_tokens: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        """What lmms-eval writes beside the sample."""
        kept = {"visual_tokens": self.visual_tokens, "kept_visual_tokens": self.kept_visual_tokens}
        return {**super().to_dict(), **kept}


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
        nframes: int | None = None,
        max_frames: int | None = None,
        system_prompt: str | None = None,
        trace: str | None = None,
        target: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,  # noqa: ARG002 - lmms-eval passes it to every model
    ) -> None:
        """Load a bundle, or engines.

        The names mean what they mean in PruningConfig, Pipeline.load and `hawk-trt run`; head_weights is a file of
        weights, system_prompt comes before every conversation that has none, and trace is a file that gets a line for
        each answer. batch_size: questions answered side by side; "auto" is one.
        """
        super().__init__()
        weights = None if head_weights is None else read_head_weights(Path(head_weights)).values
        pruning = PruningConfig(
            keep_ratio=float(keep_ratio), head_weights=weights, selector=selector, query=query, quota=quota
        )
        pipe = Pipeline.load(bundle, device=device_of_rank(device, Path(bundle)), target=target)
        trace_file = None if trace is None else Path(trace)
        self._answering = Answering(pipe, pruning, min_pixels, max_pixels, trace_file, system_prompt)
        self._video = {"fps": fps, "nframes": nframes, "max_frames": max_frames}
        self._batch_size = int(batch_size) if str(batch_size).isdecimal() else 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator  # lmms-eval gathers the processes' results through it

            self.accelerator = Accelerator(cpu=True)
            self.device = self.accelerator.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request, in their order, some side by side; a repeated request has another seed each time."""
        for beams in {request.args[2].get("num_beams") or 1 for request in requests} - {1}:
            raise InvalidInput(f"num_beams: got {beams}, expected 1: hawk_trt has no beam search")
        begun = time.perf_counter()
        answers: list[Any] = []
        seen: Counter[int] = Counter()
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for start in range(0, len(requests), self._batch_size):
                batch = requests[start : start + self._batch_size]
                questions = []
                for request in batch:
                    questions.append(partial(self._request, request, seen[id(request)]))
                    seen[id(request)] += 1
                for request, result in zip(batch, self._answering.answer(questions, batch[0].args[4]), strict=True):
                    answer = _generation(result) if isinstance(result, Result) else GenerationResult("")
                    self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), answer.text)
                    answers.append(answer)
                bar.update(len(batch))
        tokens = sum(answer.token_counts.output_tokens for answer in answers if answer.token_counts)
        seconds = time.perf_counter() - begun
        log_metrics(
            total_gen_tokens=tokens,
            total_elapsed_time=seconds,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={"rank": self.rank, "kept_share": self._answering.kept_share()},
        )
        print(self._answering.summary(), file=sys.stderr)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not offered: the tasks of the paper generate."""
        raise NotImplementedError(f"hawk_trt generates; {len(requests)} requests ask for log-likelihoods instead")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: the tasks of the paper have one round."""
        raise NotImplementedError(f"hawk_trt answers one round; {len(requests)} requests have several")

    def _request(self, request: Any, repeat: int) -> Request:  # noqa: ANN401 - lmms-eval ships no types
        _, make_messages, settings, doc_id, task, split = request.args
        given = make_messages(self.task_dict[task][split][doc_id])
        messages: list[Message] = [
            {"role": turn["role"], "content": list(_items(turn["content"], self._video))} for turn in given
        ]
        return Request(
            messages,
            max_new_tokens=int(settings.get("max_new_tokens") or _MAX_NEW_TOKENS),
            sampling=_sampling(settings, repeat),
            stop=_stop(settings),
        )


def _generation(result: Result) -> Any:  # noqa: ANN401 - lmms-eval ships no types
    dropped = result.num_visual - result.num_kept
    counts = KeptTokens(
        input_tokens=len(result.kept_indices) + dropped,
        output_tokens=len(result.token_ids),
        visual_tokens=result.num_visual,
        kept_visual_tokens=result.num_kept,
    )
    return GenerationResult(text=result.text or "", token_counts=counts)


def _items(content: Any, video: Mapping[str, float | None]) -> Iterator[dict[str, Any]]:  # noqa: ANN401 - a text or a list of mappings
    """The items of a turn, from lmms-eval's form: {"type": "image", "url": ...}; video: what a video takes besides."""
    for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        kind = item["type"]
        if kind == "text":
            yield {"type": "text", "text": item["text"]}
        elif kind == "image":
            yield {"type": "image", "image": item["url"]}
        elif kind == "video":
            part = {"video_start": item.get("start_time"), "video_end": item.get("end_time")}
            yield {"type": "video", "video": item["url"], **part, **video}
        else:
            raise InvalidInput(f"messages: got {kind}, expected text, images and videos")


def _sampling(settings: Mapping[str, Any], repeat: int) -> SamplingConfig:
    """How tokens are drawn, from a task's generation_kwargs."""
    temperature = float(settings.get("temperature") or 0.0) if settings.get("do_sample", True) else 0.0
    seed = (settings.get("seed") or 0) + repeat
    return SamplingConfig(temperature, float(settings.get("top_p") or 1.0), int(settings.get("top_k") or 0), seed)


def _stop(settings: Mapping[str, Any]) -> list[str]:
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    return [] if until == _DEFAULT_UNTIL else [text for text in until if text]
