"""Qwen2-VL, and what Qwen2.5-VL and Qwen3-VL share with it.

Images and videos become patches in the order of the checkpoint's own processor (see qwen_patches.py). The vision stage
sees frames of one size at a time, as [num_frames, num_patches, patch_dim]; each attends to itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import resize
from hawk_trt.inputs.streamed_rows import StreamedRows
from hawk_trt.models import normalisation
from hawk_trt.models.config import Section, is_integer, language_config, special_tokens, text_section, vision_section
from hawk_trt.models.family import ImageSettings, IntArray, ModelConfig, Patches, TokenRun
from hawk_trt.models.normalisation import check_rgb, object_of, value_tables, whole_number
from hawk_trt.models.qwen_patches import (
    FrameBatch,
    cut,
    frame_batches,
    max_frame_pixels,
    patch_positions,
    sample_indices,
    smart_resize,
)
from hawk_trt.models.qwen_positions import check_grid, position_ids
from hawk_trt.models.vision_config import AnyVision, Qwen2Vision
from hawk_trt.request import ModelInputs
from hawk_trt.stages import LanguageConfig, StageSpec, TensorSpec

# Videos of fewer patches (77 MB of Qwen2.5-VL's) become a plain array.
STREAMED_FROM_PATCHES = 16_385

# How the tokenizer spells the tokens around and in place of images and videos.
_SPELLINGS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}
# The released config.json files leave out most of these: transformers' own defaults then hold.
_VISION_DEFAULTS = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "hidden_act": "quick_gelu",
    "mlp_ratio": 4,
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_SIZES = (
    *("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size"),
    *("patch_size", "temporal_patch_size", "spatial_merge_size"),
)
_VISION_ROPE_THETA = 10000.0
# What the processor takes where preprocessor_config.json does not say.
_MIN_PIXELS = 56 * 56
_MAX_PIXELS = 28 * 28 * 1280
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

Image = npt.NDArray[np.uint8]


class Qwen2VL:
    """The Family of Qwen2-VL checkpoints of any size."""

    name: ClassVar[str] = "qwen2_vl"
    max_frame_pixels: ClassVar[int | None] = 768 * 28 * 28  # what Qwen's own examples take
    pixel_bounds: ClassVar[Literal["frame", "video", "nothing"]] = "frame"
    vision: Qwen2Vision

    def __init__(self, vision: Qwen2Vision) -> None:
        self.vision = vision

    @classmethod
    def read_config(
        cls,
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        added_tokens: Mapping[str, int] | None = None,
    ) -> ModelConfig:
        """Read and check config.json."""
        tokens = special_tokens(config, generation or {}, added_tokens or {}, _SPELLINGS)
        return ModelConfig(cls._language_config(config), cls._vision_config(config), tokens)

    @classmethod
    def _language_config(cls, config: Mapping[str, Any]) -> LanguageConfig:
        return language_config(config)

    @classmethod
    def _vision_config(cls, config: Mapping[str, Any]) -> AnyVision:
        """config.json calls the tower's width embed_dim and the language model's hidden_size."""
        vision = vision_section(config, _VISION_DEFAULTS)
        width = vision.integer("embed_dim")
        named = {
            "hidden_size": width,
            "out_hidden_size": vision.get("hidden_size"),
            "intermediate_size": int(width * vision.number("mlp_ratio")),
        }
        return Qwen2Vision(**vision_sizes(config, Section({**vision.values, **named}, "vision_config"), "quick_gelu"))

    def vision_spec(self) -> StageSpec:
        """Inputs and outputs of the vision graph.

        num_visual = num_frames * num_patches / merge^2, frames in order, merge blocks of a frame in raster order.
        """
        inputs = (
            TensorSpec("pixel_values", "float32", ("num_frames", "num_patches", self.vision.patch_dim)),
            TensorSpec("patch_positions", "int64", ("num_patches", 2)),
        )
        return StageSpec(inputs, (TensorSpec("visual_embeds", "model", ("num_visual", self.vision.out_hidden_size)),))

    def vision_feeds(self, patches: Patches, max_patches: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage in prompt order; consecutive frames of one size share a call.

        Raises:
            InvalidInput: pixel_values and grid_thw do not fit each other, or not the model.
        """
        batches = frame_batches(patches, self.vision, max_patches)  # errors come here, not at the first feed
        return (self._feed(batch) for batch in batches)

    def _feed(self, batch: FrameBatch) -> dict[str, npt.NDArray[Any]]:
        positions = patch_positions(batch.height, batch.width, self.vision.spatial_merge_size)
        return {"pixel_values": batch.pixel_values, "patch_positions": positions}

    def image_settings(self, preprocessor: Mapping[str, Any]) -> ImageSettings:
        """Settings from preprocessor_config.json, or from video_preprocessor_config.json for videos.

        The pixel bounds are min_pixels and max_pixels, else those of size, by either of its two spellings.

        Raises:
            CheckpointError: a setting that is not usable.
        """
        size = object_of(preprocessor, "size")

        def bound(name: str, edge: str, default: int) -> int:
            found = [value for value in (preprocessor.get(name), size.get(edge), size.get(name)) if value is not None]
            return whole_number(name, found[0] if found else None, default, "a number of pixels")

        pixels = (bound("min_pixels", "shortest_edge", _MIN_PIXELS), bound("max_pixels", "longest_edge", _MAX_PIXELS))
        return normalisation.image_settings(preprocessor, pixels, _MEAN, _STD)

    def images_to_patches(self, images: Sequence[Image], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut RGB images [height, width, 3]; each becomes one frame.

        Raises:
            InvalidInput: an image that is not RGB uint8, is empty, or is too thin.
        """
        for image in images:
            check_rgb(image)
        bounds = (self.vision.token_side, settings.min_pixels, settings.max_pixels)
        sizes = [smart_resize(*_size(image, settings), *bounds) for image in images]
        patch = self.vision.patch_size
        grid = np.array([(1, tall // patch, wide // patch) for tall, wide in sizes], dtype=np.int64).reshape(-1, 3)
        counts = grid.prod(axis=1)
        pixels = np.empty((int(counts.sum()), self.vision.patch_dim), dtype=np.float32)
        tables = value_tables(settings)
        for image, (tall, wide), rows in zip(images, sizes, np.split(pixels, np.cumsum(counts)[:-1]), strict=False):
            cut(resize(image, tall, wide, settings.resample), tables, rows, self.vision, slice(None))
        return Patches(pixels, grid)

    def video_to_patches(self, frames: Sequence[Image], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut the frames of one video.

        temporal_patch_size successive frames make one temporal patch; the last frame is repeated to fill its own.
        Frames of a long video are decoded, resized and cut while the vision stage asks for them: see streamed_rows.py.

        Raises:
            InvalidInput: no frame, a frame that is not RGB uint8, is too thin or of another size.
        """
        if not len(frames):
            raise InvalidInput("video: got no frame, expected at least one")
        first = frames[0]
        for number, frame in enumerate(frames if isinstance(frames, list | tuple) else ()):  # a file's: not decoded yet
            _check_frame(frame, number, first.shape)
        check_rgb(first)
        tall, wide = self.frame_size(len(frames), *_size(first, settings), settings)
        patch, together = self.vision.patch_size, self.vision.temporal_patch_size
        steps, num_patches = -(-len(frames) // together), (tall // patch) * (wide // patch)

        def parts() -> Iterator[npt.NDArray[np.float32]]:
            """The patches of one temporal patch after another: float32 [num_patches, patch_dim] each."""
            tables = value_tables(settings)
            rows = np.empty((0, 0), np.float32)
            for number, frame in enumerate(frames):
                _check_frame(frame, number, first.shape)
                place, last = number % together, number == len(frames) - 1
                if place == 0:
                    rows = np.empty((num_patches, self.vision.patch_dim), np.float32)
                resized = resize(frame, tall, wide, settings.resample)
                cut(resized, tables, rows, self.vision, slice(place, None if last else place + 1))
                if last or place == together - 1:
                    yield rows

        rows = StreamedRows(steps * num_patches, self.vision.patch_dim, parts)
        pixels = rows if len(rows) >= STREAMED_FROM_PATCHES else np.asarray(rows)
        return Patches(pixels, np.array([(steps, tall // patch, wide // patch)], dtype=np.int64))

    def frame_size(self, num_frames: int, height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
        """Height and width of the resized frames: an image's rule, within the video's share of the context."""
        most = max_frame_pixels(num_frames, settings, self.vision)
        return smart_resize(height, width, self.vision.token_side, settings.min_pixels, most)

    def image_parts(self, image: Image, count: int) -> Sequence[Image]:
        """The image itself."""
        return [image]

    @staticmethod
    def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """Which frames of a video file are taken; see qwen_patches.sample_indices."""
        return sample_indices(total, video_fps, fps, max_frames)

    def placeholder(
        self, kind: str, grid: Sequence[int], times: Sequence[float], special: SpecialTokens
    ) -> tuple[str | TokenRun, ...]:
        """The placeholder once for each visual token."""
        token_id = special.image if kind == "image" else special.video
        assert token_id is not None  # the template has made one of it
        return (TokenRun(token_id, int(np.prod(grid)) // self.vision.spatial_merge_size**2),)

    def model_inputs(
        self,
        input_ids: IntArray,
        kinds: Sequence[str],
        images: Patches | None,
        videos: Patches | None,
        second_per_grid_ts: npt.NDArray[np.float32] | None,
    ) -> ModelInputs:
        """Images and videos apart, each with its grids."""
        return ModelInputs(
            input_ids=input_ids,
            pixel_values=None if images is None else np.asarray(images.pixel_values),
            image_grid_thw=None if images is None else images.grid_thw,
            pixel_values_videos=None if videos is None else videos.pixel_values,
            video_grid_thw=None if videos is None else videos.grid_thw,
            second_per_grid_ts=second_per_grid_ts,
        )

    def item_grids(self, inputs: ModelInputs, visual_kind: npt.NDArray[np.int8]) -> tuple[IntArray, IntArray]:
        """The grid_thw that the inputs hold: int64 [items, 3] each.

        Raises:
            InvalidInput: not of that shape, a size below 1, or no multiple of the merge size.
        """
        grids = {"image_grid_thw": inputs.image_grid_thw, "video_grid_thw": inputs.video_grid_thw}
        images, videos = (check_grid(*named, self.vision.spatial_merge_size) for named in grids.items())
        return images, videos

    def position_ids(
        self,
        visual_kind: npt.NDArray[np.int8],
        image_grid_thw: IntArray,
        video_grid_thw: IntArray,
        second_per_grid_ts: npt.NDArray[np.float32],
    ) -> IntArray:
        """Positions of a prompt without padding: int64 [3, seq_len]; how long a frame is makes no difference."""
        steps = np.ones(len(video_grid_thw), np.float32)
        merge = self.vision.spatial_merge_size
        return position_ids(visual_kind, image_grid_thw, video_grid_thw, steps, merge, 1.0)


def vision_sizes(config: Mapping[str, Any], vision: Section, hidden_act: str) -> dict[str, Any]:
    """The fields of Qwen2Vision.

    Args:
        config: config.json.
        vision: its vision_config.
        hidden_act: the only activation that the family's graph computes.

    Raises:
        CheckpointError: a setting is missing or not supported.
    """
    vision.expect("hidden_act", hidden_act)
    sizes: dict[str, Any] = {key: vision.integer(key) for key in _SIZES}
    channels = "in_channels" if "in_channels" in vision.values else "in_chans"
    if vision.integer(channels) != 3:
        raise vision.wrong(channels, "3 (RGB)")
    # Every patch rotates half of each head by its row and half by its column, in pairs.
    if sizes["hidden_size"] % (4 * sizes["num_heads"]):
        raise vision.wrong("num_heads", f"a divisor of hidden_size / 4 = {sizes['hidden_size']}/4")
    text_hidden_size = text_section(config).integer("hidden_size")
    if sizes["out_hidden_size"] != text_hidden_size:
        raise vision.wrong("out_hidden_size", f"the text's hidden_size {text_hidden_size}")
    rope = Section(vision.get("rope_parameters") or {}, "vision_config.rope_parameters")
    rope.expect("rope_type", "axial", "axial")
    return {**sizes, "in_channels": 3, "rope_theta": float(rope.get("rope_theta", _VISION_ROPE_THETA))}


def block_numbers(vision: Section, key: str) -> tuple[int, ...]:
    """Block numbers of the vision tower.

    Raises:
        CheckpointError: they are missing, or something else.
    """
    blocks, depth = vision.get(key), vision.integer("depth")
    if not isinstance(blocks, list | tuple) or not all(is_integer(block) and 0 <= block < depth for block in blocks):
        raise vision.wrong(key, f"a list of block numbers below depth {depth}")
    return tuple(blocks)


def _size(image: Image, settings: ImageSettings) -> tuple[int, int]:
    """Height and width to take an image for."""
    height, width = settings.resized or image.shape[:2]
    return height, width


def _check_frame(frame: Image, number: int, shape: tuple[int, ...]) -> None:
    if frame.shape != shape:
        raise InvalidInput(f"video: frame {number} is {list(frame.shape)}, expected {list(shape)} as the first")
