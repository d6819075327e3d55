"""Where the first value was made that is not finite, once a sampler has met one."""

import numpy as np

from hawk_trt.runtime.protocol import Row, Visual
from hawk_trt.stages import LanguageConfig

_FLOAT16_HELP = "float16 overflows on some inputs: export again with --dtype bfloat16 or float32"


def first_not_finite(visual: Visual | None, row: Row, language: LanguageConfig) -> str:
    """A sentence that says in which stage and layer the first value that is not finite was made, and what helps.

    visual: visual embeddings of the batch, None where they were looked at before.  row: after the step that went wrong.
    """
    if visual is not None and not np.isfinite(visual.numpy().astype(np.float32)).all():
        return f"The first value that is not finite is in vision's visual_embeds. {_FLOAT16_HELP}"
    last = language.scoring_layer
    for layer in range(language.num_hidden_layers):
        if not all(np.isfinite(part.astype(np.float32)).all() for part in row.cache(layer)):
            stage = "first_layer" if layer <= last else "decoder"
            made = "its own projections" if layer == 0 else f"layer {layer - 1}'s output or its own projections"
            return f"The first value that is not finite is in {stage}, layer {layer}: {made}. {_FLOAT16_HELP}"
        if layer == last and not np.isfinite(row.hidden_states()).all():
            return f"The first value that is not finite is in first_layer: the output of layer {last}. {_FLOAT16_HELP}"
    return f"All keys and values are finite: the last layer, the norm or lm_head of decoder made it. {_FLOAT16_HELP}"
