"""Vision sizes of a small model of each family, with the patches and tiles of the real ones."""

from hawk_trt.models.vision_config import InternVLVision, Qwen3Vision, Qwen25Vision

_TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3}
_FRAMES = {**_TOWER, "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 24, "rope_theta": 10000.0}

QWEN2_5_VL = Qwen25Vision(**_FRAMES, patch_size=14, tokens_per_second=2.0, window_size=112, fullatt_block_indexes=(1,))
QWEN3_VL = Qwen3Vision(**_FRAMES, patch_size=16, num_position_embeddings=16, deepstack_visual_indexes=(0,))
INTERNVL = InternVLVision(
    **_TOWER,
    temporal_patch_size=1,
    spatial_merge_size=2,
    out_hidden_size=24,
    patch_size=14,
    image_size=448,
    norm="layer_norm",
    layer_norm_eps=1e-6,
    qk_norm=False,
    qkv_bias=True,
    min_tiles=1,
    max_tiles=12,
    use_thumbnail=True,
)
