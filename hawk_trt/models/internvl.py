"""InternVL3 (Qwen2) and InternVL3.5 (Qwen3): images and videos as tiles, what placeholders say, 1-D positions.

An image is resized to the grid of square tiles whose shape is nearest to its own and cut into them, row by row; where
there is more than one, a small version of the whole, the thumbnail, follows as a tile of its own. A frame of a video is
one tile. Every tile becomes the same number of visual tokens.

The processor gives no grid: a prompt holds a run of <IMG_CONTEXT> for each image or frame, between <img> and </img>,
and pixel_values holds all tiles in the prompt's order. A run is an item here, of as many tiles as its length says;
its grid_thw is [tiles, patches, patches]. A video is its frames, each an item behind the text "Frame1: " and so on.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.images import resize
from hawk_trt.models.family import (
    BICUBIC,
    IMAGE,
    VIDEO,
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
    whole_number,
    wrong,
)
from hawk_trt.models.vision_config import InternVLVision
from hawk_trt.request import ModelInputs

# Of a video file, where no rate is asked for: what the model's own examples take.
_DEFAULT_FRAMES = 8
# ImageNet's, which all checkpoints of the family have.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class InternVL:
    """The Family of InternVL3 and InternVL3.5 checkpoints, those of transformers (-hf) and the original ones."""

    max_frame_pixels: ClassVar[int | None] = None
    pixel_bounds: ClassVar[PixelBounds] = "nothing"
    vision: InternVLVision

    def __init__(self, vision: InternVLVision) -> None:
        self.vision = vision

    def vision_feeds(self, patches: Patches, max_patches: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        tiles = max(1, max_patches // self.vision.tile_patches**2)
        for start in range(0, len(patches.pixel_values), tiles):
            yield {"pixel_values": np.ascontiguousarray(patches.pixel_values[start : start + tiles], np.float32)}

    def image_settings(self, preprocessor: Mapping[str, Any]) -> ImageSettings:
        """Settings from preprocessor_config.json; its bounds of tiles become bounds of pixels.

        crop_to_patches is not read: the checkpoints' processors cut images into tiles whatever it says.
        """
        side = self.vision.image_size
        size = preprocessor.get("size") or side
        sides = [value for value in size.values() if value is not None] if isinstance(size, Mapping) else [size]
        if not sides or any(value != side for value in sides):
            raise wrong("size", size, f"tiles of {side} x {side} pixels, as config.json says")

        def tiles(name: str, default: int) -> int:
            return whole_number(name, preprocessor.get(name), default, "a number of tiles")

        few, many = tiles("min_patches", self.vision.min_tiles), tiles("max_patches", self.vision.max_tiles)
        return ImageSettings.read(preprocessor, (few * side**2, many * side**2), _MEAN, _STD)

    def images_to_patches(self, images: Sequence[Image], settings: ImageSettings) -> Patches:
        """Tiles [tiles, 3, side, side], and a [tiles, patches, patches] for each; bounds leave out the thumbnail."""
        side = self.vision.image_size
        most = max(1, settings.max_pixels // side**2)
        fewest = min(most, -(-settings.min_pixels // side**2))
        for image in images:
            check_rgb(image)
        grids = [tile_grid(image.shape[0], image.shape[1], side, fewest, most) for image in images]
        counts = [columns * rows + self._has_thumbnail(columns * rows) for columns, rows in grids]
        cut = (self._cut(image, *grid, settings.resample) for image, grid in zip(images, grids, strict=True))
        return self._patches(cut, counts, settings)

    def video_to_patches(self, frames: Sequence[Image], settings: ImageSettings) -> Patches:
        if not len(frames):
            raise InvalidInput("video: got no frame, expected at least one")

        def cut() -> Iterator[Image]:
            for frame in frames:
                check_rgb(frame)
                yield self._cut(frame, 1, 1, settings.resample)

        return self._patches(cut(), [len(frames)], settings)

    def image_parts(self, image: Image, count: int) -> Sequence[Image]:
        """The tiles that an image was cut into, the thumbnail last."""
        tiles = count - self._has_thumbnail(count)
        grid = tile_grid(image.shape[0], image.shape[1], self.vision.image_size, tiles, tiles)
        return list(self._cut(image, *grid, BICUBIC))

    @staticmethod
    def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """The middles of equal parts of the video: 8 of them, or as many as fps asks for."""
        wanted = _DEFAULT_FRAMES if fps is None else int(total / video_fps * fps)
        count = max(1, min(wanted, max_frames, total))
        step = total / count
        # The processor's own arithmetic: rounded to float32, then truncated.
        numbers: IntArray = (step / 2 + np.arange(count) * step).astype(np.float32).astype(np.int64)
        return numbers

    def placeholder(self, item: Patches, special: SpecialTokens) -> tuple[str | TokenRun, ...]:
        """An image's tiles between <img> and </img>; a video's frames so, each a line that its number begins."""
        if special.image is None or special.vision_start is None or special.vision_end is None:
            raise InvalidInput(
                "prompt: this bundle's tokenizer lacks <img>, <IMG_CONTEXT> or </img>, expected those of an InternVL "
                "checkpoint. Pass ModelInputs"
            )
        start, end = TokenRun(special.vision_start), TokenRun(special.vision_end)
        if item.kind == "image":
            return (start, TokenRun(special.image, item.grid[0] * self.vision.tile_tokens), end)
        parts: list[str | TokenRun] = []
        for number in range(1, item.grid[0] + 1):
            line = "" if number == 1 else "\n"
            parts += [f"{line}Frame{number}: ", start, TokenRun(special.image, self.vision.tile_tokens), end]
        return tuple(parts)

    def model_inputs(self, input_ids: IntArray, items: Sequence[Patches]) -> ModelInputs:
        tiles = joined_rows([item.pixel_values for item in items]) if items else None
        return ModelInputs(input_ids, pixel_values=None if tiles is None else np.asarray(tiles))

    def item_grids(self, inputs: ModelInputs, visual_kind: Kinds) -> tuple[IntArray, IntArray]:
        """The grids that the runs of placeholders say, and no videos, whose frames are images here."""
        for name in ("image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            if getattr(inputs, name) is not None:
                raise InvalidInput(
                    f"{name}: got it, expected None: InternVL takes all tiles in pixel_values, frames of videos among "
                    "them, and its placeholders say which tile is of which image"
                )
        if (visual_kind == VIDEO).any():
            raise InvalidInput(
                "input_ids: got a <video> placeholder, expected each frame as <img>, its <IMG_CONTEXT> and </img>"
            )
        tile_tokens = self.vision.tile_tokens
        edges = np.flatnonzero(np.diff(np.r_[0, visual_kind == IMAGE, 0]))
        runs = edges[1::2] - edges[::2]
        if (runs % tile_tokens).any():
            item = int((runs % tile_tokens > 0).argmax())
            raise InvalidInput(
                f"input_ids: image {item}: got {runs[item]} placeholders in a row, expected a multiple of "
                f"{tile_tokens}, the tokens of a tile"
            )
        tiles = runs // tile_tokens
        side = self.vision.image_size
        shape = (0, 3, side, side) if inputs.pixel_values is None else np.shape(inputs.pixel_values)
        if tuple(shape) != (tiles.sum(), 3, side, side):
            raise InvalidInput(
                f"pixel_values: got {'none' if inputs.pixel_values is None else list(shape)}, "
                f"expected float32[{tiles.sum()}, 3, {side}, {side}]: the placeholders are of {tiles.tolist()} tiles"
            )
        return self._grids(tiles.tolist()), self._grids([])

    def position_ids(self, visual_kind: Kinds, images: IntArray, videos: IntArray, seconds: Floats) -> IntArray:
        """One position after another, text and visual tokens alike: int64 [1, seq_len]."""
        return np.arange(len(visual_kind), dtype=np.int64)[None]

    def _has_thumbnail(self, tiles: int) -> bool:
        return self.vision.use_thumbnail and tiles > 1

    def _cut(self, image: Image, columns: int, rows: int, resample: int) -> Image:
        """The tiles of an image, row by row, and its thumbnail: uint8 [tiles, side, side, 3]."""
        side = self.vision.image_size
        whole = resize(image, rows * side, columns * side, resample)
        tiles: Image = whole.reshape(rows, side, columns, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, side, side, 3)
        return np.concatenate([tiles, self._cut(image, 1, 1, resample)]) if self._has_thumbnail(len(tiles)) else tiles

    def _patches(self, cut: Iterable[Image], counts: Sequence[int], settings: ImageSettings) -> Patches:
        """Normalise the tiles of images and videos; counts: of each."""
        side = self.vision.image_size
        pixels = np.empty((sum(counts), 3, side, side), dtype=np.float32)
        tables, start = settings.value_tables(), 0
        for tiles in cut:
            for channel, table in enumerate(tables):
                pixels[start : start + len(tiles), channel] = table[tiles[..., channel]]
            start += len(tiles)
        return Patches(pixels, self._grids(counts))

    def _grids(self, counts: Sequence[int]) -> IntArray:
        """The grid_thw of items of so many tiles: int64 [items, 3], a tile as a step in time."""
        patches = self.vision.tile_patches
        return np.array([(count, patches, patches) for count in counts], dtype=np.int64).reshape(-1, 3)


def tile_grid(height: int, width: int, side: int, fewest: int, most: int) -> tuple[int, int]:
    """Columns and rows of the tiles of an image.

    The grid of the aspect ratio nearest to the image's, of fewest to most tiles; of equally near ones the smallest,
    or a larger one that the image fills by more than half. side: of a tile, in pixels.
    """
    grids = [
        (columns, rows)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if columns * rows >= fewest
    ]
    best, best_distance = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        distance = abs(width / height - columns / rows)
        filled = height * width > 0.5 * side**2 * columns * rows
        if distance < best_distance or (distance == best_distance and filled):
            best, best_distance = (columns, rows), distance
    return best
