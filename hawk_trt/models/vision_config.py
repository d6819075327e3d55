"""Sizes of the vision towers, one class a family: read and checked from config.json, kept in the manifest.

The manifest says the family beside the sizes, so that each is decoded as its own class.
"""

from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt


class VisionConfig(msgspec.Struct, frozen=True, kw_only=True, tag_field="family"):
    """Sizes that all vision towers have, by Hugging Face's names.

    A visual token is a block of spatial_merge_size x spatial_merge_size patches. temporal_patch_size frames make one
    patch in time. out_hidden_size is the width of the language model.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int

    @property
    def family(self) -> str:
        return str(self.__struct_config__.tag)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x temporal patch x patch x patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def token_side(self) -> int:
        """Pixels on a side of a visual token."""
        return self.patch_size * self.spatial_merge_size

    def tokens_per_item(self, grid_thw: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Visual tokens of each image or video: int64 [items]. grid_thw: [items, 3], in patches."""
        counts: npt.NDArray[np.int64] = grid_thw.prod(axis=1) // self.spatial_merge_size**2
        return counts


class Qwen2Vision(VisionConfig, frozen=True, kw_only=True, tag="qwen2_vl"):
    """Qwen2-VL. rope_theta: of the 2-D rotary embedding of the patches."""

    rope_theta: float


class Qwen25Vision(Qwen2Vision, frozen=True, kw_only=True, tag="qwen2_5_vl"):
    """Qwen2.5-VL.

    tokens_per_second: of mRoPE's time axis. window_size: in pixels. fullatt_block_indexes: blocks that attend over
    whole frames, not over windows.
    """

    tokens_per_second: float
    window_size: int
    fullatt_block_indexes: tuple[int, ...]

    @property
    def window_side(self) -> int:
        """Visual tokens on a side of a window."""
        return self.window_size // self.token_side


class Qwen3Vision(Qwen2Vision, frozen=True, kw_only=True, tag="qwen3_vl"):
    """Qwen3-VL.

    num_position_embeddings: entries of the square table of positions. deepstack_visual_indexes: blocks whose features
    the first language layers add.
    """

    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]


class Qwen35Vision(Qwen3Vision, frozen=True, kw_only=True, tag="qwen3_5"):
    """Qwen3.5: Qwen3-VL's tower without DeepStack."""


class InternVLVision(VisionConfig, frozen=True, kw_only=True, tag="internvl"):
    """InternVL3 and 3.5: the tower, and how an image is cut into tiles.

    image_size: pixels on a side of a tile. norm: "layer_norm" or "rms_norm". min_tiles and max_tiles do not count the
    thumbnail, a small version of the whole image.
    """

    image_size: int
    norm: str
    layer_norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool

    @property
    def tile_patches(self) -> int:
        """Patches on a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def tile_tokens(self) -> int:
        return (self.image_size // self.token_side) ** 2


AnyVision: TypeAlias = Qwen2Vision | Qwen25Vision | Qwen3Vision | Qwen35Vision | InternVLVision
