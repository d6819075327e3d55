"""Cosine similarity, as several selectors need it."""

import numpy as np

from hawk_trt.pruning.selectors.candidates import Float32Array

_SMALLEST_NORM = np.float32(1e-12)


def unit_rows(vectors: Float32Array) -> Float32Array:
    """Scale rows to length 1; a row of zeros stays.

    Args:
        vectors: (n, hidden) float32.
    """
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    unit: Float32Array = vectors / np.maximum(norms, _SMALLEST_NORM)
    return unit
