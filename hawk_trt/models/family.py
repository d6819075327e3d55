"""The supported model families. A family is one file of runtime facts here and one vision graph in export/.

A family turns a checkpoint's config into sizes, images into patches, and patches into the feeds of the
vision stage; everything after the vision stage is the same for all.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import CheckpointError
from hawk_trt.inputs.streamed_rows import StreamedRows
from hawk_trt.request import ModelInputs
from hawk_trt.stages import LanguageConfig, StageSpec

IntArray: TypeAlias = npt.NDArray[np.int64]

# What visual_kind says of a token.
TEXT, IMAGE, VIDEO = 0, 1, 2


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How images are resized and normalised, from preprocessor_config.json.

    min_pixels and max_pixels bound the area after resizing; mean and std are per RGB channel, on [0, 1].
    max_video_tokens, where it is given, makes the frames of a long video smaller: see qwen_video.
    """

    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float
    resample: int
    max_video_tokens: int | None = None


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


class Family(Protocol):
    """What the runtime and the exporter ask of a model family.

    Attributes:
        name: in bundles.
        architectures: of config.json.
        max_frame_pixels: the largest area of a video frame where the checkpoint says no bounds for videos, None for
            that of images.
    """

    name: str
    architectures: tuple[str, ...]
    max_frame_pixels: int | None

    def language_config(self, config: Mapping[str, Any]) -> LanguageConfig:
        """Sizes of the language model from config.json.

        Raises:
            CheckpointError: a setting is missing or not supported.
        """

    def vision_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes of the vision tower from config.json, as stored in the manifest.

        Raises:
            CheckpointError: a setting is missing or not supported.
        """

    def special_tokens(
        self, config: Mapping[str, Any], generation: Mapping[str, Any], added_tokens: Mapping[str, int]
    ) -> SpecialTokens:
        """Ids that the runtime must know, from config.json, generation_config.json and the tokenizer's added tokens.

        Raises:
            CheckpointError: an id that is no integer.
        """

    def chat_template(self, config: Mapping[str, Any]) -> str | None:
        """The Jinja of a checkpoint whose own files hold none that knows images; None where they do."""

    def vision_spec(self, vision: Mapping[str, Any], hidden_size: int) -> StageSpec:
        """Inputs and outputs of the vision graph."""

    def item_grids(
        self, inputs: ModelInputs, visual_kind: npt.NDArray[np.int8], vision: Mapping[str, Any]
    ) -> tuple[IntArray, IntArray]:
        """The grid_thw of a prompt's images and of its videos, wherever the family's processor says them.

        visual_kind: [seq_len], padding included, 0 text, 1 image placeholder, 2 video placeholder.

        Raises:
            InvalidInput: grids, placeholders and pixel values do not fit each other.
        """

    def tokens_per_item(self, grid_thw: npt.NDArray[np.int64], vision: Mapping[str, Any]) -> npt.NDArray[np.int64]:
        """Visual tokens of each image or video: int64 [items]."""

    def vision_feeds(
        self, patches: Patches, vision: Mapping[str, Any], max_patches: int
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage, one call after another, together in prompt order.

        max_patches bounds a call's patches (a single frame may exceed it).

        Raises:
            InvalidInput: pixel_values and grid_thw do not fit each other.
        """

    def image_settings(self, preprocessor: Mapping[str, Any], vision: Mapping[str, Any]) -> ImageSettings:
        """Settings from preprocessor_config.json.

        Raises:
            CheckpointError: a setting that is not usable.
        """

    def images_to_patches(
        self, images: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings, vision: Mapping[str, Any]
    ) -> Patches:
        """Resize, normalise and cut RGB images [height, width, 3].

        Raises:
            InvalidInput: an image whose shape cannot be used.
        """

    def video_to_patches(
        self, frames: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings, vision: Mapping[str, Any]
    ) -> Patches:
        """Resize, normalise and cut the sampled RGB frames of one video, all of one size.

        Raises:
            InvalidInput: frames whose shapes cannot be used.
        """

    def image_parts(
        self, image: npt.NDArray[np.uint8], count: int, vision: Mapping[str, Any]
    ) -> Sequence[npt.NDArray[np.uint8]]:
        """The pictures that the steps of an image's grid show, RGB: the image itself, or its tiles.

        count: steps of its grid_thw.
        """

    def frame_numbers(self, total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """Which frames of a video file are taken: int64, ascending.

        total: frames of the file.  video_fps: its rate.  fps: asked for, None for the family's own rule.
        """

    def placeholder(
        self,
        kind: str,
        grid: Sequence[int],
        times: Sequence[float],
        vision: Mapping[str, Any],
        special: SpecialTokens,
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

    def position_ids(
        self,
        visual_kind: npt.NDArray[np.int8],
        image_grid_thw: npt.NDArray[np.int64],
        video_grid_thw: npt.NDArray[np.int64],
        second_per_grid_ts: npt.NDArray[np.float32],
        vision: Mapping[str, Any],
    ) -> npt.NDArray[np.int64]:
        """Positions of a prompt without padding: int64 [axes, seq_len].

        visual_kind: [seq_len], 0 text, 1 image placeholder, 2 video placeholder.

        Raises:
            InvalidInput: placeholders and grids do not fit each other.
        """


# Close relatives of what is supported, and why they are not.
_REFUSED = {
    "Qwen3VLMoeForConditionalGeneration": "Its layers are mixtures of experts; take a dense Qwen3-VL, such as the 8B",
}


def families() -> tuple[Family, ...]:
    """All supported families."""
    from hawk_trt.models.internvl import InternVL  # here, since each family file imports this module
    from hawk_trt.models.qwen2_5_vl import Qwen25VL
    from hawk_trt.models.qwen2_vl import Qwen2VL
    from hawk_trt.models.qwen3_vl import Qwen3VL

    return (Qwen25VL(), Qwen2VL(), Qwen3VL(), InternVL())


def family_by_name(name: str) -> Family:
    """The family of a bundle.

    Raises:
        CheckpointError: no such family.
    """
    for family in families():
        if family.name == name:
            return family
    raise CheckpointError(f"family: got {name!r}, supported are {', '.join(f.name for f in families())}")


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a checkpoint's config.json.

    Raises:
        CheckpointError: an architecture that is not supported.
    """
    got = tuple(config.get("architectures") or ()) or (str(config.get("model_type")),)
    for family in families():
        if set(got) & set(family.architectures):
            return family
    supported = ", ".join(name for family in families() for name in family.architectures)
    reasons = "".join(f". {_REFUSED[name]}" for name in got if name in _REFUSED)
    raise CheckpointError(f"architecture: got {', '.join(got)}, supported are {supported}{reasons}")
