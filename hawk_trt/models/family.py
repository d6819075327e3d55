"""What the runtime asks of a model family, and the values that go between; load_family knows which families there are.

A family turns images into patches, and patches into the feeds of the vision stage; everything after the vision stage
is the same for all. A family is one file here, a reader of its config.json, and one vision graph in export/.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, TypeGuard

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import CheckpointError, InvalidInput
from hawk_trt.models.vision_config import VisionConfig
from hawk_trt.request import ModelInputs

if TYPE_CHECKING:
    from hawk_trt.models.streamed_rows import StreamedRows

Image: TypeAlias = npt.NDArray[np.uint8]
IntArray: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float32]
Kinds: TypeAlias = npt.NDArray[np.int8]  # of each token of a prompt: TEXT, IMAGE or VIDEO
Channels: TypeAlias = tuple[float, float, float]
PixelBounds: TypeAlias = Literal["frame", "video", "nothing"]

TEXT, IMAGE, VIDEO = 0, 1, 2
BICUBIC = 3  # of Pillow's filters
# Normalised values are float32: what lies beyond these is no setting of pixels.
_MOST = 1e6
_LEAST_STD = 1e-6


@dataclass(frozen=True, slots=True)
class ImageSettings:
    """How images are resized and normalised.

    min_pixels and max_pixels bound the area after resizing; mean and std are per RGB channel, on [0, 1].
    max_video_tokens, where it is given, makes the frames of a long video smaller: see qwen_video. total_pixels does
    so for one video. resized: height and width to take an image for, before they are rounded to whole tokens.
    """

    min_pixels: int
    max_pixels: int
    mean: Channels
    std: Channels
    rescale_factor: float
    resample: int
    max_video_tokens: int | None = None
    total_pixels: int | None = None
    resized: tuple[int, int] | None = None

    @classmethod
    def read(
        cls, preprocessor: Mapping[str, Any], pixels: tuple[int, int], mean: Channels, std: Channels
    ) -> "ImageSettings":
        """Settings from preprocessor_config.json; a key whose value is null counts as not there.

        pixels: the least and the most of an image after resizing, which every family says in its own way.  mean, std:
        where the file does not say. Raises CheckpointError where a setting is not usable.
        """
        if preprocessor.get("do_resize") is False:
            raise wrong("do_resize", False, "true (images are cut into whole patches)")
        if pixels[0] > pixels[1]:
            raise wrong("min_pixels", pixels[0], f"at most max_pixels {pixels[1]}")
        given = {key: value for key, value in preprocessor.items() if value is not None}
        resample = given.get("resample", BICUBIC)
        if isinstance(resample, bool) or not isinstance(resample, int) or resample not in range(6):
            raise wrong("resample", resample, "one of Pillow's filters, 0 to 5")
        factor = given.get("rescale_factor", 1 / 255)
        if not _is_number(factor) or not 0 < factor < _MOST:
            raise wrong("rescale_factor", factor, "a number above 0")
        if preprocessor.get("do_normalize") is False:
            given |= {"image_mean": 0.0, "image_std": 1.0}
        return cls(
            min_pixels=pixels[0],
            max_pixels=pixels[1],
            mean=_channel_values("image_mean", given.get("image_mean", mean)),
            std=_channel_values("image_std", given.get("image_std", std)),
            rescale_factor=1.0 if preprocessor.get("do_rescale") is False else float(factor),
            resample=resample,
        )

    def size_of(self, image: Image) -> tuple[int, int]:
        """Height and width to take an image for."""
        height, width = self.resized or image.shape[:2]
        return height, width

    def value_tables(self) -> npt.NDArray[np.float32]:
        """The normalised value of each 8-bit value: float32 [3, 256].

        Rounded where the checkpoint's processor rounds: the rescaled value to float32, then mean and std in float32.
        """
        rescaled = (np.arange(256, dtype=np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        table: npt.NDArray[np.float32] = (rescaled - mean) / std
        return table


@dataclass(frozen=True, slots=True)
class Patches:
    """Images or videos as the vision stage takes them, or one of them as a prompt has it.

    pixel_values: float32 [num_patches, patch_dim], in the order of the checkpoint's own processor; of a long video made
    while it is read.  grid_thw: int64 [items, 3], patches in time, height and width of each.  Of the one image or
    video: its kind, the seconds of each frame from the video's start, and those that one temporal patch spans.
    """

    pixel_values: "Floats | StreamedRows"
    grid_thw: IntArray
    kind: Literal["image", "video"] = "image"
    times: Sequence[float] = ()
    seconds_per_patch: float = 1.0

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches in time, height and width of the one image or video."""
        time, height, width = self.grid_thw[0].tolist()
        return time, height, width


@dataclass(frozen=True, slots=True)
class TokenRun:
    """A token, as often as it is repeated."""

    token_id: int
    count: int = 1


class Family(Protocol):
    """A model family, with the vision sizes of one model; what it cannot use is refused as InvalidInput.

    max_frame_pixels: the largest area of a video frame where the checkpoint says no bounds for videos, None for that of
    images.  pixel_bounds: what the bounds of a video's pixels bound: each "frame", the whole "video", or "nothing",
    since frames and tiles have one size.
    """

    max_frame_pixels: ClassVar[int | None]
    pixel_bounds: ClassVar[PixelBounds]

    @property
    def vision(self) -> VisionConfig:
        """Sizes of the vision tower."""

    def vision_feeds(self, patches: Patches, max_patches: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage in prompt order, of at most max_patches a call (a single frame may exceed it)."""

    def image_settings(self, preprocessor: Mapping[str, Any]) -> ImageSettings:
        """Settings from preprocessor_config.json, or from video_preprocessor_config.json for videos."""

    def images_to_patches(self, images: Sequence[Image], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut RGB images [height, width, 3]."""

    def video_to_patches(self, frames: Sequence[Image], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut the sampled RGB frames of one video, all of one size."""

    def image_parts(self, image: Image, count: int) -> Sequence[Image]:
        """The pictures that the `count` steps of an image's grid show, RGB: the image itself, or its tiles."""

    @staticmethod
    def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """Which frames of a video file are taken: int64, ascending. fps: asked for, None for the family's own rule."""

    def placeholder(self, item: Patches, special: SpecialTokens) -> tuple[str | TokenRun, ...]:
        """What the chat template's one placeholder of an image or video becomes: texts and runs of tokens.

        What brings tokens around it of its own takes the place of those that the template has around it.
        """

    def model_inputs(self, input_ids: IntArray, items: Sequence[Patches]) -> ModelInputs:
        """The tensors of a prompt in the layout of the checkpoint's own processor; items in the prompt's order."""

    def item_grids(self, inputs: ModelInputs, visual_kind: Kinds) -> tuple[IntArray, IntArray]:
        """The grid_thw of a prompt's images and of its videos. visual_kind: [seq_len], padding included."""

    def position_ids(self, visual_kind: Kinds, images: IntArray, videos: IntArray, seconds: Floats) -> IntArray:
        """Positions of a prompt without padding: int64 [axes, seq_len].

        images, videos: their grid_thw, int64 [items, 3].  seconds: that one temporal patch of each video spans.
        """


def joined_rows(parts: "Sequence[Floats | StreamedRows]") -> "Floats | StreamedRows":
    """Arrays below each other; streamed where one of them is."""
    if len(parts) == 1:
        return parts[0]
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    if len(arrays) == len(parts):
        return np.concatenate(arrays)
    from hawk_trt.models.streamed_rows import StreamedRows  # only long videos are

    return StreamedRows.joined(parts)


def object_of(preprocessor: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The JSON object under a key, empty where there is none."""
    value = preprocessor.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise wrong(key, value, "a JSON object")
    return value or {}


def whole_number(name: str, value: object, default: int, expected: str) -> int:
    """An integer of at least 1, which JSON may also write as 50176.0; the default for null."""
    if value is None:
        return default
    if not _is_number(value) or not 1 <= value < _MOST**2 or value != int(value):
        raise wrong(name, value, expected)
    return int(value)


def wrong(key: str, got: object, expected: str) -> CheckpointError:
    """The error of a setting that cannot be used."""
    return CheckpointError(f"preprocessor_config.json: {key}: got {repr(got)[:200]}, expected {expected}")


def check_rgb(image: Image) -> None:
    """Refuse, as InvalidInput, what is not uint8 [height, width, 3], or empty."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise InvalidInput(f"image: got {image.dtype}{list(image.shape)}, expected uint8[height, width, 3]")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _channel_values(name: str, value: object) -> Channels:
    values = tuple(value) if isinstance(value, list | tuple) else (value,) * 3
    if len(values) != 3 or not all(_is_number(v) and abs(v) < _MOST for v in values):
        raise wrong(name, value, "three numbers, one a channel")
    if name == "image_std" and min(values) < _LEAST_STD:
        raise wrong(name, value, "numbers above 0")
    return float(values[0]), float(values[1]), float(values[2])
