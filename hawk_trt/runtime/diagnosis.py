"""Where a run first went wrong: the stage and layer of the first value that is not a finite number.

Stages leave behind their outputs and each layer its keys and values, so nothing has to be run again.
"""

import numpy as np

from hawk_trt.runtime.protocol import Generation, Visual

_HELP = "float16 overflows on some inputs: export again with --dtype bfloat16 or float32"


def first_not_finite(visual: Visual | None, generation: Generation, num_layers: int, row: int) -> str:
    """Say where the first value that is not finite was made.

    Args:
        visual: visual embeddings of the batch, None where they were looked at before.
        generation: after the step that went wrong.
        num_layers: of the language model, layer 0 included.
        row: of the batch.

    Returns:
        A sentence that names stage and layer, and what helps.
    """
    if visual is not None and not np.isfinite(visual.numpy().astype(np.float32)).all():
        return f"The first value that is not finite is in vision's visual_embeds. {_HELP}"
    for layer in range(num_layers):
        key, value = (tensor[row].astype(np.float32) for tensor in generation.cache(layer))
        if not (np.isfinite(key).all() and np.isfinite(value).all()):
            stage = "first_layer" if layer == 0 else "decoder"
            made = "its own projections" if layer == 0 else f"layer {layer - 1}'s output or its own projections"
            return f"The first value that is not finite is in {stage}, layer {layer}: {made}. {_HELP}"
        if layer == 0 and not np.isfinite(generation.hidden_states()[row]).all():
            return f"The first value that is not finite is in first_layer: the output of layer 0. {_HELP}"
    return f"All keys and values are finite: the last layer, the norm or lm_head of decoder made it. {_HELP}"
