"""Model families: what each asks of the host. No family's file is imported but that of the model that is loaded."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hawk_trt.models.family import Family
    from hawk_trt.models.vision_config import AnyVision


def load_family(vision: "AnyVision") -> "Family":
    """The family of a model, with its sizes."""
    from hawk_trt.models.vision_config import InternVLVision, Qwen3Vision, Qwen25Vision

    if isinstance(vision, InternVLVision):
        from hawk_trt.models.internvl import InternVL

        return InternVL(vision)
    if isinstance(vision, Qwen25Vision):
        from hawk_trt.models.qwen2_5_vl import Qwen25VL

        return Qwen25VL(vision)
    if isinstance(vision, Qwen3Vision):
        from hawk_trt.models.qwen3_vl import Qwen3VL

        return Qwen3VL(vision)
    from hawk_trt.models.qwen2_vl import Qwen2VL

    return Qwen2VL(vision)
