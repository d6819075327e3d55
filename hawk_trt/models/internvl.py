"""Runtime facts of InternVL3: sizes, tiles, what placeholders say, 1-D positions.

The processor gives no grid: a prompt holds a run of <IMG_CONTEXT> for each image or frame, between <img> and </img>,
and pixel_values holds all tiles in the prompt's order. A run is an item here, of as many tiles as its length says;
its grid_thw is [tiles, patches, patches]. A video is its frames, each an item behind the text "Frame1: " and so on.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import InvalidInput
from hawk_trt.models import internvl_config, internvl_tiles
from hawk_trt.models.family import IMAGE, VIDEO, ImageSettings, IntArray, ModelConfig, Patches, TokenRun
from hawk_trt.models.vision_config import InternVLVision
from hawk_trt.request import ModelInputs
from hawk_trt.stages import StageSpec, TensorSpec

# Of a video file, where no rate is asked for: what the model's own examples take.
_DEFAULT_FRAMES = 8


class InternVL:
    """The Family of InternVL3 checkpoints with a Qwen2 language side, of both makes."""

    name: ClassVar[str] = "internvl"
    max_frame_pixels: ClassVar[int | None] = None
    pixel_bounds: ClassVar[Literal["frame", "video", "nothing"]] = "nothing"
    vision: InternVLVision

    def __init__(self, vision: InternVLVision) -> None:
        self.vision = vision

    @staticmethod
    def read_config(
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        added_tokens: Mapping[str, int] | None = None,
    ) -> ModelConfig:
        """Read and check config.json, of either make; see internvl_config."""
        return ModelConfig(
            internvl_config.language_config(config),
            internvl_config.vision_config(config),
            internvl_config.special_tokens(config, generation or {}, added_tokens or {}),
            internvl_config.chat_template(config),
        )

    def vision_spec(self) -> StageSpec:
        """Inputs and outputs of the vision graph; num_visual counts the tokens of all tiles, tile after tile."""
        side = self.vision.image_size
        return StageSpec(
            inputs=(TensorSpec("pixel_values", "float32", ("num_tiles", 3, side, side)),),
            outputs=(TensorSpec("visual_embeds", "model", ("num_visual", self.vision.out_hidden_size)),),
        )

    def item_grids(self, inputs: ModelInputs, visual_kind: npt.NDArray[np.int8]) -> tuple[IntArray, IntArray]:
        """The grids that the runs of placeholders say, and no videos, whose frames are images here.

        Raises:
            InvalidInput: placeholders and tiles do not fit each other, or inputs that other families have.
        """
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
                f"{tile_tokens}, so many a tile"
            )
        tiles = runs // tile_tokens
        side = self.vision.image_size
        shape = (0, 3, side, side) if inputs.pixel_values is None else np.shape(inputs.pixel_values)
        if tuple(shape) != (tiles.sum(), 3, side, side):
            raise InvalidInput(
                f"pixel_values: got {'none' if inputs.pixel_values is None else list(shape)}, "
                f"expected float32[{tiles.sum()}, 3, {side}, {side}]: the placeholders are of {tiles.tolist()} tiles"
            )
        return internvl_tiles.tile_grids(tiles.tolist(), self.vision), internvl_tiles.tile_grids([], self.vision)

    def vision_feeds(self, patches: Patches, max_patches: int) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Feeds of the vision stage, some tiles a call, in prompt order."""
        tiles = max(1, max_patches // self.vision.tile_patches**2)
        for start in range(0, len(patches.pixel_values), tiles):
            yield {"pixel_values": np.ascontiguousarray(patches.pixel_values[start : start + tiles], np.float32)}

    def image_settings(self, preprocessor: Mapping[str, Any]) -> ImageSettings:
        """Settings from preprocessor_config.json or video_preprocessor_config.json; see internvl_tiles."""
        return internvl_tiles.image_settings(preprocessor, self.vision)

    def images_to_patches(self, images: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings) -> Patches:
        """Resize, cut and normalise RGB images [height, width, 3]; see internvl_tiles.images_to_tiles."""
        return internvl_tiles.images_to_tiles(images, settings, self.vision)

    def video_to_patches(self, frames: Sequence[npt.NDArray[np.uint8]], settings: ImageSettings) -> Patches:
        """Resize and normalise the frames of one video, one tile each; see internvl_tiles.video_to_tiles."""
        return internvl_tiles.video_to_tiles(frames, settings, self.vision)

    def image_parts(self, image: npt.NDArray[np.uint8], count: int) -> Sequence[npt.NDArray[np.uint8]]:
        """The tiles of an image, the thumbnail last; see internvl_tiles.tiles_of."""
        return list(internvl_tiles.tiles_of(image, count, self.vision))

    @staticmethod
    def frame_numbers(total: int, video_fps: float, fps: float | None, max_frames: int) -> IntArray:
        """The middles of equal parts of the video: 8 of them, or as many as fps asks for."""
        wanted = _DEFAULT_FRAMES if fps is None else int(total / video_fps * fps)
        count = max(1, min(wanted, max_frames, total))
        step = total / count
        # The processor's own arithmetic: rounded to float32, then truncated.
        numbers: IntArray = (step / 2 + np.arange(count) * step).astype(np.float32).astype(np.int64)
        return numbers

    def placeholder(
        self, kind: str, grid: Sequence[int], times: Sequence[float], special: SpecialTokens
    ) -> tuple[str | TokenRun, ...]:
        """An image's tiles between <img> and </img>; a video's frames so, each a line that its number begins."""
        if special.image is None or special.vision_start is None or special.vision_end is None:
            raise InvalidInput(
                "prompt: this bundle's tokenizer lacks <img>, <IMG_CONTEXT> or </img>, expected those of an InternVL "
                "checkpoint. Pass ModelInputs"
            )
        start, end = TokenRun(special.vision_start), TokenRun(special.vision_end)
        tile_tokens = self.vision.tile_tokens
        if kind == "image":
            return (start, TokenRun(special.image, grid[0] * tile_tokens), end)
        parts: list[str | TokenRun] = []
        for number in range(1, grid[0] + 1):
            line = "" if number == 1 else "\n"
            parts += [f"{line}Frame{number}: ", start, TokenRun(special.image, tile_tokens), end]
        return tuple(parts)

    def model_inputs(
        self,
        input_ids: IntArray,
        kinds: Sequence[str],
        images: Patches | None,
        videos: Patches | None,
        second_per_grid_ts: npt.NDArray[np.float32] | None,
    ) -> ModelInputs:
        """All tiles in pixel_values, in the order of the prompt."""
        given = {"image": images, "video": videos}
        present = [patches for patches in given.values() if patches is not None]
        if len(present) < 2:
            return ModelInputs(input_ids, pixel_values=np.asarray(present[0].pixel_values) if present else None)
        tiles = {kind: _items(patches) for kind, patches in given.items() if patches is not None}
        return ModelInputs(input_ids, pixel_values=np.concatenate([next(tiles[kind]) for kind in kinds]))

    def position_ids(
        self,
        visual_kind: npt.NDArray[np.int8],
        image_grid_thw: IntArray,
        video_grid_thw: IntArray,
        second_per_grid_ts: npt.NDArray[np.float32],
    ) -> IntArray:
        """One position after another, text and visual tokens alike: int64 [1, seq_len]."""
        return np.arange(len(visual_kind), dtype=np.int64)[None]


def _items(patches: Patches) -> Iterator[npt.NDArray[np.float32]]:
    """The tiles of each image or video."""
    return iter(np.split(patches.pixel_values, np.cumsum(patches.grid_thw[:, 0])[:-1]))
