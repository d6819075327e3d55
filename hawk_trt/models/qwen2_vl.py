"""Qwen2-VL, and what Qwen2.5-VL and Qwen3-VL share with it.

Images and videos become patches in the order of the checkpoint's own processor (see qwen_patches.py). The vision stage
sees frames of one size at a time, as [num_frames, num_patches, patch_dim]; each attends to itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.inputs.images import resize
from hawk_trt.models import qwen_patches
from hawk_trt.models.family import (
    Floats,
    Image,
    ImageSettings,
    IntArray,
    Kinds,
    Patches,
    PixelBounds,
    TokenRun,
    check_rgb,
    joined_rows,
    object_of,
    whole_number,
    wrong,
)
from hawk_trt.models.vision_config import Qwen2Vision
from hawk_trt.request import ModelInputs

# What the processor takes where preprocessor_config.json does not say.
_MIN_PIXELS = 56 * 56
_MAX_PIXELS = 28 * 28 * 1280
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class Qwen2VL:
    """The Family of Qwen2-VL checkpoints of any size."""

    max_frame_pixels: ClassVar[int | None] = 768 * 28 * 28  # what Qwen's own examples take
    pixel_bounds: ClassVar[PixelBounds] = "frame"
    vision: Qwen2Vision

    def __init__(self, vision: Qwen2Vision) -> None:
        self.vision = vision

    def vision_feeds(self, patches: Patches, max_patches: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage in prompt order; consecutive frames of one size share a call."""
        for pixels, height, width in qwen_patches.frame_batches(patches, self.vision, max_patches):
            yield self._feed(pixels, height, width)

    def _feed(self, pixels: Floats, height: int, width: int) -> dict[str, npt.NDArray[Any]]:
        positions = qwen_patches.patch_positions(height, width, self.vision.spatial_merge_size)
        return {"pixel_values": pixels, "patch_positions": positions}

    def image_settings(self, preprocessor: Mapping[str, Any]) -> ImageSettings:
        """The pixel bounds are min_pixels and max_pixels, else those of size, by either of its two spellings."""
        size, vision = object_of(preprocessor, "size"), self.vision
        for name, own in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            if preprocessor.get(name) not in (None, own):
                raise wrong(name, preprocessor[name], f"{own}, as vision_config of config.json has it")

        def bound(name: str, edge: str, default: int) -> int:
            found = [value for value in (preprocessor.get(name), size.get(edge), size.get(name)) if value is not None]
            return whole_number(name, found[0] if found else None, default, "a number of pixels")

        pixels = (bound("min_pixels", "shortest_edge", _MIN_PIXELS), bound("max_pixels", "longest_edge", _MAX_PIXELS))
        return ImageSettings.read(preprocessor, pixels, _MEAN, _STD)

    def images_to_patches(self, images: Sequence[Image], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut RGB images [height, width, 3]; each becomes one frame."""
        for image in images:
            check_rgb(image)
        bounds = (self.vision.token_side, settings.min_pixels, settings.max_pixels)
        sizes = [qwen_patches.smart_resize(*settings.size_of(image), *bounds) for image in images]
        patch = self.vision.patch_size
        grid = np.array([(1, tall // patch, wide // patch) for tall, wide in sizes], dtype=np.int64).reshape(-1, 3)
        counts = grid.prod(axis=1)
        pixels = np.empty((int(counts.sum()), self.vision.patch_dim), dtype=np.float32)
        tables = settings.value_tables()
        for image, (tall, wide), rows in zip(images, sizes, np.split(pixels, np.cumsum(counts)[:-1]), strict=False):
            qwen_patches.cut(resize(image, tall, wide, settings.resample), tables, rows, self.vision, slice(None))
        return Patches(pixels, grid)

    def video_to_patches(self, frames: Sequence[Image], settings: ImageSettings) -> Patches:
        """Resize, normalise and cut the frames of one video.

        temporal_patch_size successive frames make one temporal patch; the last frame is repeated to fill its own.
        Frames of a long video are decoded, resized and cut while the vision stage asks for them.
        """
        from hawk_trt.models.qwen_video import video_patches  # most prompts have none

        return video_patches(frames, settings, self.vision, self.frame_size)

    def frame_size(self, num_frames: int, height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
        """Height and width of the resized frames: an image's rule, within the video's share of the context."""
        from hawk_trt.models.qwen_video import max_frame_pixels

        most = max_frame_pixels(num_frames, settings, self.vision)
        return qwen_patches.smart_resize(height, width, self.vision.token_side, settings.min_pixels, most)

    def image_parts(self, image: Image, count: int) -> Sequence[Image]:
        return [image]

    @staticmethod
    def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        from hawk_trt.models.qwen_video import sample_indices

        return sample_indices(total, video_fps, fps, max_frames)

    def placeholder(self, item: Patches, special: SpecialTokens) -> tuple[str | TokenRun, ...]:
        """The placeholder once for each visual token."""
        token_id = special.image if item.kind == "image" else special.video
        assert token_id is not None  # the template has made one of it
        return (TokenRun(token_id, int(np.prod(item.grid)) // self.vision.spatial_merge_size**2),)

    def model_inputs(self, input_ids: IntArray, items: Sequence[Patches]) -> ModelInputs:
        images = [item for item in items if item.kind == "image"]
        videos = [item for item in items if item.kind == "video"]
        return ModelInputs(
            input_ids=input_ids,
            pixel_values=np.asarray(joined_rows([own.pixel_values for own in images])) if images else None,
            image_grid_thw=np.concatenate([own.grid_thw for own in images]) if images else None,
            pixel_values_videos=joined_rows([own.pixel_values for own in videos]) if videos else None,
            video_grid_thw=np.concatenate([own.grid_thw for own in videos]) if videos else None,
            second_per_grid_ts=np.array([own.seconds_per_patch for own in videos], np.float32) if videos else None,
        )

    def item_grids(self, inputs: ModelInputs, visual_kind: Kinds) -> tuple[IntArray, IntArray]:
        merge = self.vision.spatial_merge_size
        images = qwen_patches.check_grid("image_grid_thw", inputs.image_grid_thw, merge)
        return images, qwen_patches.check_grid("video_grid_thw", inputs.video_grid_thw, merge)

    def position_ids(self, visual_kind: Kinds, images: IntArray, videos: IntArray, seconds: Floats) -> IntArray:
        """Positions whose time axis counts temporal patches: how long a frame is makes no difference."""
        steps = np.ones(len(videos), np.float32)
        return qwen_patches.position_ids(visual_kind, images, videos, steps, self.vision.spatial_merge_size, 1.0)
