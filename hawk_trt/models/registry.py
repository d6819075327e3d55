"""Which model families there are: by the name that bundles have, or by the architecture of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from hawk_trt.errors import CheckpointError
from hawk_trt.models.config import Section
from hawk_trt.models.family import Family

_ARCHITECTURES = {
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen3VLForConditionalGeneration": "qwen3_vl",
    "InternVLForConditionalGeneration": "internvl",
    "InternVLChatModel": "internvl",
}
# Close relatives of what is supported, and why they are not.
_REFUSED = {
    "Qwen3VLMoeForConditionalGeneration": "Its layers are mixtures of experts; take a dense Qwen3-VL, such as the 8B",
}


def family_by_name(name: str) -> type[Family]:
    """The family of a bundle; no other family's file is imported.

    Raises:
        CheckpointError: no such family.
    """
    if name == "qwen2_5_vl":
        from hawk_trt.models.qwen2_5_vl import Qwen25VL

        return Qwen25VL
    if name == "qwen2_vl":
        from hawk_trt.models.qwen2_vl import Qwen2VL

        return Qwen2VL
    if name == "qwen3_vl":
        from hawk_trt.models.qwen3_vl import Qwen3VL

        return Qwen3VL
    if name == "internvl":
        from hawk_trt.models.internvl import InternVL

        return InternVL
    raise CheckpointError(f"family: got {name!r}, supported are {', '.join(sorted(set(_ARCHITECTURES.values())))}")


def family_of(config: Mapping[str, Any]) -> type[Family]:
    """The family of a checkpoint's config.json.

    Raises:
        CheckpointError: an architecture that is not supported.
    """
    named = config.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise Section(config).wrong("architectures", "a list of names")
    got = tuple(named or ()) or (str(config.get("model_type"))[:60],)
    for name in got:
        if name in _ARCHITECTURES:
            return family_by_name(_ARCHITECTURES[name])
    reasons = "".join(f". {_REFUSED[name]}" for name in got if name in _REFUSED)
    raise CheckpointError(f"architecture: got {', '.join(got)}, supported are {', '.join(_ARCHITECTURES)}{reasons}")
