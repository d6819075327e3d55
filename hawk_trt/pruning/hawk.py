"""HAWK in numpy float32: the oracle that every graph, backend and kernel is tested against.

The plain form of the paper, not the absorbed one of the graphs. Once a prefill, before layer 0:

    s_i(n)   = mean over query tokens t of q_i(t) . k_g(n) / sqrt(head_dim)      no RoPE, biases included
    score(n) = sum_i w_i normalise(s_i)(n)
    kept     = all text tokens and the k best visual tokens, in their order
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.errors import InvalidInput
from hawk_trt.request import num_kept as num_kept
from hawk_trt.stages import BIAS_KEEP, NORMALIZATIONS

Float32Array = npt.NDArray[np.float32]

_L2_EPSILON = np.float32(1e-12)
_MINMAX_EPSILON = np.finfo(np.float32).eps


def head_scores(
    inputs_embeds: Float32Array,
    query_weights: Float32Array,
    norm_weight: Float32Array,
    norm_epsilon: float,
    q_proj: tuple[Float32Array, Float32Array | None],
    k_proj: tuple[Float32Array, Float32Array | None],
    num_heads: int,
    num_kv_heads: int,
    qk_norms: tuple[Float32Array, Float32Array] | None = None,
) -> Float32Array:
    """Raw score of every token in every head: float32 (num_heads, seq_len).

    Args:
        inputs_embeds: (seq_len, hidden) merged text and visual embeddings.
        query_weights: (seq_len), 1/T at the T query tokens, else 0.
        norm_weight: (hidden), layer 0's input norm.
        norm_epsilon: of that norm, and of qk_norms.
        q_proj: weight (num_heads * head_dim, hidden) and bias (num_heads * head_dim) or None.
        k_proj: weight (num_kv_heads * head_dim, hidden) and bias or None.
        num_heads: query heads.
        num_kv_heads: key heads.
        qk_norms: weights (head_dim) of the RMS norms of queries and keys, where the model has them.
    """
    x = inputs_embeds.astype(np.float32)
    h = _rms_norm(x, norm_weight, norm_epsilon)
    asked = query_weights > 0
    query = _project(h[asked], q_proj).reshape(-1, num_heads, q_proj[0].shape[0] // num_heads)
    key = _project(h, k_proj).reshape(len(h), num_kv_heads, -1)
    if qk_norms is not None:
        query, key = (_rms_norm(t, weight, norm_epsilon) for t, weight in zip((query, key), qk_norms, strict=True))
    key = np.repeat(key, num_heads // num_kv_heads, axis=1)
    mean_query = np.einsum("t,thd->hd", query_weights[asked], query)
    scores = np.einsum("hd,nhd->hn", mean_query, key) / np.float32(math.sqrt(query.shape[-1]))
    return _float32(scores)


@np.errstate(over="ignore", invalid="ignore")
def normalize(scores: Float32Array, visual: npt.NDArray[np.bool_], normalization: str) -> Float32Array:
    """Normalise each head over the visual tokens; what is not visual, or not finite, is 0 before.

    Args:
        scores: (..., heads, seq_len) raw scores; the result has this shape, and 0 at positions that are not visual.
        visual: (..., seq_len), whether a position is a visual token.
        normalization: "l2", "softmax" or "minmax"; any other is InvalidInput.
    """
    mask = visual[..., None, :]
    s = np.where(mask & np.isfinite(scores), scores, np.float32(0.0)).astype(np.float32)
    if normalization == "l2":
        norm = np.sqrt(np.sum(s * s, axis=-1, keepdims=True, dtype=np.float32))
        return _float32(s / np.maximum(norm, _L2_EPSILON))
    if normalization == "softmax":
        top = np.max(np.where(mask, s, -np.inf), axis=-1, keepdims=True, initial=-BIAS_KEEP)
        powers = np.where(mask, np.exp(np.where(mask, s - top, 0.0)), 0.0).astype(np.float32)
        return _float32(powers / np.maximum(np.sum(powers, axis=-1, keepdims=True), np.float32(1e-30)))
    if normalization == "minmax":
        top = np.max(np.where(mask, s, -BIAS_KEEP), axis=-1, keepdims=True).astype(np.float32)
        bottom = np.min(np.where(mask, s, BIAS_KEEP), axis=-1, keepdims=True).astype(np.float32)
        scaled = (s - bottom) / np.maximum(top - bottom, _MINMAX_EPSILON)
        return _float32(np.where(mask, scaled, np.float32(0.0)))
    raise InvalidInput(f"normalization: got {normalization!r}, expected one of {', '.join(NORMALIZATIONS)}")


def weighted_topk(
    raw_scores: Float32Array,
    head_weights: Float32Array,
    visual_rows: npt.NDArray[np.int64],
    select_bias: Float32Array,
    num_kept_total: int,
    normalization: str,
) -> tuple[npt.NDArray[np.int32], Float32Array]:
    """The rule of hawk::WeightedTopK.

    Args:
        raw_scores: (batch, heads, seq_len).
        head_weights: (heads), used as given.
        visual_rows: (batch, seq_len), below 0 where a position is not visual.
        select_bias: (batch, seq_len); at 3e38 or beyond it alone decides.
        num_kept_total: K, positions kept a row.
        normalization: "l2", "softmax" or "minmax".

    Returns:
        kept indices (batch, K) int32, ascending; scores (batch, seq_len) float32, before the bias.
    """
    visual = visual_rows >= 0
    normal = normalize(raw_scores, visual, normalization)
    scores = np.einsum("h,bhn->bn", head_weights.astype(np.float32), normal).astype(np.float32)
    keys = weighted_topk_keys(scores, select_bias)
    # a stable descending sort, so that the lower index wins a tie
    best = np.argsort(-keys, axis=-1, kind="stable")[:, :num_kept_total]
    return np.sort(best, axis=-1).astype(np.int32), scores


def weighted_topk_keys(scores: Float32Array, select_bias: Float32Array) -> Float32Array:
    """What tokens compete by: the bias where it decides alone, else score plus bias. (batch, seq_len) each."""
    return _float32(np.where(np.abs(select_bias) >= np.float32(BIAS_KEEP), select_bias, scores + select_bias))


def _rms_norm(x: Float32Array, weight: Float32Array, epsilon: float) -> Float32Array:
    rms = np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + np.float32(epsilon))
    return _float32(x / rms * weight)


def _project(x: Float32Array, projection: tuple[Float32Array, Float32Array | None]) -> Float32Array:
    weight, bias = projection
    y: Float32Array = x @ weight.T
    return y if bias is None else y + bias


def _float32(values: npt.NDArray[Any]) -> Float32Array:
    return values.astype(np.float32)
