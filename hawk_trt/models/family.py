"""What the runtime and the exporter ask of a model family; registry.py knows which there are.

A family reads a checkpoint's config.json, turns images into patches, and patches into the feeds of the vision stage;
everything after the vision stage is the same for all. A family is one file here and one vision graph in export/.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.inputs.streamed_rows import StreamedRows
from hawk_trt.models.vision_config import AnyVision, VisionConfig
from hawk_trt.request import ModelInputs
from hawk_trt.stages import LanguageConfig, StageSpec

IntArray: TypeAlias = npt.NDArray[np.int64]

# What visual_kind says of a token.
TEXT, IMAGE, VIDEO = 0, 1, 2


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How images are resized and normalised, from preprocessor_config.json.

    min_pixels and max_pixels bound the area after resizing; mean and std are per RGB channel, on [0, 1].
    max_video_tokens, where it is given, makes the frames of a long video smaller: see qwen_patches. total_pixels does
    so for one video. resized: height and width to take an image for, before they are rounded to whole tokens.
    """

    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float
    resample: int
    max_video_tokens: int | None = None
    total_pixels: int | None = None
    resized: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Patches:
    """Images or videos as the vision stage takes them.

    Attributes:
        pixel_values: float32 [num_patches, patch_dim], in the order of the checkpoint's own processor; of a long
            video made while it is read.
        grid_thw: int64 [items, 3], patches in time, height and width of each image or video.
    """

    pixel_values: npt.NDArray[np.float32] | StreamedRows
    grid_thw: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenRun:
    """A token, as often as it is repeated."""

    token_id: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a checkpoint's config.json says, checked.

    chat_template: the Jinja of a checkpoint whose own files hold none that knows images; None where they do.
    """

    language: LanguageConfig
    vision: AnyVision
    special_tokens: SpecialTokens
    chat_template: str | None = None


class Family(Protocol):
    """A model family, with the vision sizes of one model.

    Attributes:
        name: in bundles.
        max_frame_pixels: the largest area of a video frame where the checkpoint says no bounds for videos, None for
            that of images.
        pixel_bounds: what the bounds of a video's pixels bound: each "frame", the whole "video", or "nothing", since
            frames and tiles have one size.
    """

    name: ClassVar[str]
    max_frame_pixels: ClassVar[int | None]
    pixel_bounds: ClassVar[Literal["frame", "video", "nothing"]]

    def __init__(self, vision: VisionConfig) -> None:
        """Take the model's vision sizes, of the family's own class."""

    @property
    def vision(self) -> VisionConfig:
        """Sizes of the vision tower."""

    @staticmethod
    def read_config(
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        added_tokens: Mapping[str, int] | None = None,
    ) -> ModelConfig:
        """Read and check config.json.

        Args:
            config: config.json.
            generation: generation_config.json, where there is one.
            added_tokens: content to id of the tokenizer's added tokens, where there is a tokenizer.

        Raises:
            CheckpointError: a setting is missing or not supported.
        """

    def vision_spec(self) -> StageSpec:
        """Inputs and outputs of the vision graph."""

    def vision_feeds(self, patches: Patches, max_patches: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage, one call after another, together in prompt order.

        max_patches bounds a call's patches (a single frame may exceed it).

        Raises:
            InvalidInput: pixel_values and grid_thw do not fit each other.
        """

    def image_settings(self, preprocessor: Mapping[str, Any]) -> ImageSettings:
        """Settings from preprocessor_config.json, or from video_preprocessor_config.json for videos.

        Raises:
            CheckpointError: a setting that is not usable.
        """

    def images_to_patches(self, images: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut RGB images [height, width, 3].

        Raises:
            InvalidInput: an image whose shape cannot be used.
        """

    def video_to_patches(self, frames: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut the sampled RGB frames of one video, all of one size.

        Raises:
            InvalidInput: frames whose shapes cannot be used.
        """

    def image_parts(self, image: npt.NDArray[np.uint8], count: int) -> Sequence[npt.NDArray[np.uint8]]:
        """The pictures that the steps of an image's grid show, RGB: the image itself, or its tiles.

        count: steps of its grid_thw.
        """

    @staticmethod
    def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """Which frames of a video file are taken: int64, ascending.

        total: frames of the file.  video_fps: its rate.  fps: asked for, None for the family's own rule.
        """

    def placeholder(
        self, kind: str, grid: Sequence[int], times: Sequence[float], special: SpecialTokens
    ) -> tuple[str | TokenRun, ...]:
        """What the chat template's one placeholder of an image or video becomes: texts and runs of tokens.

        kind: "image" or "video".  grid: its row of grid_thw.  times: seconds of each frame of a video, from its
        start.  What brings tokens around it of its own takes the place of those that the template has around it.
        """

    def model_inputs(
        self,
        input_ids: IntArray,
        kinds: Sequence[str],
        images: Patches | None,
        videos: Patches | None,
        second_per_grid_ts: npt.NDArray[np.float32] | None,
    ) -> ModelInputs:
        """The tensors of a prompt in the layout of the checkpoint's own processor.

        kinds: "image" or "video", in the order of the prompt; images and videos are in that order too.
        """

    def item_grids(self, inputs: ModelInputs, visual_kind: npt.NDArray[np.int8]) -> tuple[IntArray, IntArray]:
        """The grid_thw of a prompt's images and of its videos, wherever the family's processor says them.

        visual_kind: [seq_len], padding included, 0 text, 1 image placeholder, 2 video placeholder.

        Raises:
            InvalidInput: grids, placeholders and pixel values do not fit each other.
        """

    def position_ids(
        self,
        visual_kind: npt.NDArray[np.int8],
        image_grid_thw: IntArray,
        video_grid_thw: IntArray,
        second_per_grid_ts: npt.NDArray[np.float32],
    ) -> IntArray:
        """Positions of a prompt without padding: int64 [axes, seq_len].

        Args:
            visual_kind: [seq_len], 0 text, 1 image placeholder, 2 video placeholder.
            image_grid_thw: [images, 3], patches in time, height and width.
            video_grid_thw: [videos, 3].
            second_per_grid_ts: [videos], seconds that one temporal patch spans.

        Raises:
            InvalidInput: placeholders and grids do not fit each other.
        """
