"""What enters a generation and what comes out: ModelInputs, Request, Result, Timings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hawk_trt.streamed_rows import StreamedRows

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

    ImageInput: TypeAlias = str | PathLike[str] | bytes | PillowImage | npt.NDArray[np.uint8]
    VideoInput: TypeAlias = str | PathLike[str] | npt.NDArray[np.uint8] | Sequence[ImageInput]
    Message: TypeAlias = Mapping[str, Any]
    Prompt: TypeAlias = "str | Sequence[Message] | ModelInputs"


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """Tensors of one prompt in the layout of the checkpoint's own processor.

    Attributes:
        input_ids: int64 [seq_len] or [1, seq_len], placeholders already expanded.
        attention_mask: int64, the same shape; 0 at padding; None is all ones.
        pixel_values: float32 [num_patches, patch_dim] (Qwen) or [tiles, 3, 448, 448] (InternVL).
        image_grid_thw: int64 [images, 3], patches in time, height and width.
        pixel_values_videos: as pixel_values, of the videos; those that prepare makes of a long video are made
            while they are read, and numpy.asarray makes the array.
        video_grid_thw: int64 [videos, 3].
        second_per_grid_ts: float32 [videos], seconds that one temporal patch spans; None is 1.0 each.
    """

    input_ids: npt.ArrayLike
    attention_mask: npt.ArrayLike | None = None
    pixel_values: npt.NDArray[Any] | None = None
    image_grid_thw: npt.ArrayLike | None = None
    pixel_values_videos: npt.NDArray[Any] | StreamedRows | None = None
    video_grid_thw: npt.ArrayLike | None = None
    second_per_grid_ts: npt.ArrayLike | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of a batch: a string, chat messages or ModelInputs, with its images and videos."""

    prompt: "Prompt"
    images: "Sequence[ImageInput]" = ()
    videos: "Sequence[VideoInput]" = ()


@dataclass(slots=True)
class Timings:
    """Seconds by stage of one generation; a batch reports the whole batch's in each result.

    preprocess: image decoding, resizing, patches, chat template, tokens, positions.
    vision: the vision stage.  select: the host's choice of tokens, 0 where the graph makes it.
    first_layer, decoder: the prefill of each.
    decode: all decode steps together.  total: wall clock from call to result.
    """

    preprocess: float = 0.0
    vision: float = 0.0
    select: float = 0.0
    first_layer: float = 0.0
    decoder: float = 0.0
    decode: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """One answer.

    Attributes:
        text: the answer, None without a tokenizer.
        token_ids: int ids generated, the stop token included when it ended the answer.
        finish_reason: "stop" or "length".
        num_visual: visual tokens in the prompt.
        num_kept: visual tokens kept.
        kept_indices: int64 [kept], positions kept, text and visual, in the prompt as given, ascending,
            without those whose attention_mask is 0.
        scores: float32 [num_visual], HAWK's score of each visual token in prompt order, before any bias.
        timings: seconds by stage.
        logits: float32 [steps, vocab] where asked for; row i is what token_ids[i] was chosen from.
        num_cached: images and videos of the prompt (InternVL: frames) that the vision stage did not run for, since
            the vision cache knew them.
    """

    text: str | None
    token_ids: list[int]
    finish_reason: str
    num_visual: int
    num_kept: int
    kept_indices: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    timings: Timings = field(default_factory=Timings)
    logits: npt.NDArray[np.float32] | None = None
    num_cached: int = 0
