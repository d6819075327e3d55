"""Answers a harness's chat messages with a pipeline, and counts what was kept of their visual tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hawk_trt.request import PruningConfig, Request, SamplingConfig

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline
    from hawk_trt.request import Message


class Answering:
    """A pipeline with the settings of one run of a benchmark; min_pixels and max_pixels: see Pipeline.prepare."""

    def __init__(
        self, pipe: "Pipeline", pruning: PruningConfig, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> None:
        self._pipe = pipe
        self._pruning = pruning
        self._min_pixels = min_pixels
        self._max_pixels = max_pixels
        self._answers = self._visual = self._kept = 0
        self._seconds = 0.0

    def answer(
        self,
        conversations: "Sequence[Sequence[Message]]",
        max_new_tokens: int,
        sampling: SamplingConfig | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Answer conversations side by side.

        Raises:
            InvalidInput: a message, image or video that cannot be used.
            BackendError: the runtime failed.
        """
        results = self._pipe.generate_batch(
            [Request(messages) for messages in conversations],
            self._pruning,
            max_new_tokens,
            sampling,
            stop,
            min_pixels=self._min_pixels,
            max_pixels=self._max_pixels,
        )
        self._answers += len(results)
        self._visual += sum(result.num_visual for result in results)
        self._kept += sum(result.num_kept for result in results)
        self._seconds += results[0].timings.total if results else 0.0
        return [result.text or "" for result in results]

    def summary(self) -> str:
        """What was done so far, in a line."""
        share = 100.0 * self._kept / self._visual if self._visual else 100.0
        seconds = self._seconds / max(self._answers, 1)
        return (
            f"hawk_trt: {self._answers} answers, {self._kept} of {self._visual} visual tokens kept ({share:.1f} %), "
            f"{seconds:.3f} s an answer"
        )
