"""Answers a harness's questions with a pipeline; a question that cannot be answered costs its own answer alone.

Each answer leaves a line in the trace, where one is asked for: a JSON object with the hash of the question's text, the
visual tokens of its prompt and those kept, the tokens generated, and the answer or the error.
"""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hawk_trt.bundle import holds_engines
from hawk_trt.errors import HawkError
from hawk_trt.request import PruningConfig, Request, Result

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

# So many failures one after another are no bad questions: the run ends with the last one's error.
_FAILURES_IN_A_ROW = 5


class Answering:
    """A pipeline with the settings of one run of a benchmark.

    min_pixels and max_pixels: see Pipeline.prepare. system: a system message where a conversation brings none.
    """

    def __init__(
        self,
        pipe: "Pipeline",
        pruning: PruningConfig,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        trace: Path | None = None,
        system: str | None = None,
    ) -> None:
        self._pipe = pipe
        self._system = system
        self._options: dict[str, Any] = {"pruning": pruning, "min_pixels": min_pixels, "max_pixels": max_pixels}
        rank = int(os.environ.get("RANK", "0"))
        self._trace = trace.with_stem(f"{trace.stem}.rank{rank}") if trace is not None and rank else trace
        self._answers = self._failures = self._failed_in_a_row = 0
        self._visual = self._kept = self._seconds = 0.0

    def answer(self, questions: Sequence[Callable[[], Request]], source: str) -> list[Result | HawkError]:
        """Answer questions side by side: a result for each, or the reason why there is none.

        What a question raises counts as its own. source: a data set, or a task, for the trace.

        Raises:
            HawkError: so many failed one after another that no other will be answered.
        """
        request: Request | None = None
        try:
            requests = [self._with_system(question()) for question in questions]
            request = requests[0]
            results = self._pipe.generate_batch(requests, **self._options)
        except HawkError as error:
            if len(questions) > 1:
                return [self.answer([question], source)[0] for question in questions]
            self._failures += 1
            self._failed_in_a_row += 1
            if self._failed_in_a_row == _FAILURES_IN_A_ROW:
                raise
            print(f"hawk_trt: {source}: a question has no answer: {error}", file=sys.stderr)
            self._note(source, request, error=str(error))
            return [error]
        self._failed_in_a_row = 0
        self._answers += len(results)
        self._seconds += results[0].timings.total
        for request, result in zip(requests, results, strict=True):
            self._visual += result.num_visual
            self._kept += result.num_kept
            counts = {"num_visual": result.num_visual, "num_kept": result.num_kept, "num_tokens": len(result.token_ids)}
            self._note(source, request, **counts, answer=result.text)
        return list(results)

    def kept_share(self) -> float:
        """Visual tokens kept of all so far; 1 where there were none."""
        return self._kept / self._visual if self._visual else 1.0

    def summary(self) -> str:
        """What was done so far, in a line."""
        failed = f"{self._failures} questions without an answer, " if self._failures else ""
        return (
            f"hawk_trt: {self._answers} answers, {failed}{self._kept:.0f} of {self._visual:.0f} visual tokens kept "
            f"({100 * self.kept_share():.1f} %), {self._seconds / max(self._answers, 1):.3f} s an answer"
        )

    def _with_system(self, request: Request) -> Request:
        messages: Any = request.prompt
        if self._system is None or messages[0]["role"] == "system":
            return request
        system = {"role": "system", "content": [{"type": "text", "text": self._system}]}
        return replace(request, prompt=[system, *messages])

    def _note(self, source: str, request: Request | None, **more: object) -> None:
        if self._trace is None:
            return
        turns: Any = () if request is None else request.prompt
        texts = [item["text"] for turn in turns for item in turn["content"] if item["type"] == "text"]
        question = hashlib.sha256("\n".join(texts).encode(errors="surrogatepass")).hexdigest()
        with self._trace.open("ab") as file:
            file.write(msgspec.json.encode({"source": source, "question": question, **more}) + b"\n")


def device_of_rank(device: str | None, folder: Path) -> str | None:
    """Of a process that torchrun started: the GPU of its own, where a GPU is asked for without a number."""
    rank = os.environ.get("LOCAL_RANK")
    if rank is None or not (device == "cuda" or (device is None and holds_engines(folder))):
        return device
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return f"cuda:{int(rank) % len(visible) if visible else rank}"
