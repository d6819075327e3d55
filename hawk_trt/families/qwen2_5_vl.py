"""Runtime facts of Qwen2.5-VL: sizes, patches, the vision host plan and mRoPE positions.

The vision stage sees frames of one size at a time, as [num_frames, num_patches, patch_dim]. Every frame of
a size shares its host plan: window order, rotary positions and window masks. Full-attention layers then
need no gather and no mask, and there never is an N x N mask.
"""
