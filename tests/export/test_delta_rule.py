"""The gated delta rule in chunks: values against the recurrence, token by token, in float64."""

from functools import cache

import numpy as np
import onnxruntime as ort
import pytest

from export.delta_rule import chunks_of, delta_rule
from export.graph import GraphBuilder
from hawk_trt.bundle import GraphEntry, TensorEntry
from hawk_trt.stages import LINEAR_CHUNK, MAX_LINEAR_TOKENS, PORTABLE, TENSORRT, LinearAttentionConfig

SIZES = LinearAttentionConfig(num_key_heads=2, num_value_heads=4, key_head_dim=16, value_head_dim=12, conv_kernel=4)
KEYS, VALUES, HEADS = 2 * 16, 4 * 12, 4
STATE = (HEADS, SIZES.key_head_dim, SIZES.value_head_dim)
INPUTS = ("query", "key", "value", "decay", "beta")


@cache
def session(target: str) -> ort.InferenceSession:
    """The rule alone, as a graph."""
    tokens, state = ("batch", "seq"), ("batch", *STATE)
    shapes = dict(zip(INPUTS, (KEYS, KEYS, VALUES, HEADS, HEADS), strict=True))
    entry = GraphEntry(
        "rule", target, "rule.onnx",
        (*(TensorEntry(name, "float32", (*tokens, size)) for name, size in shapes.items()),
         TensorEntry("past", "float32", state)),
        (TensorEntry("out", "float32", (*tokens, VALUES)), TensorEntry("present", "float32", state)),
    )  # fmt: skip
    g = GraphBuilder(entry, "float32", None)
    given = g.inputs
    chunks = chunks_of(g, g.op("Shape", given["query"], start=0, end=2, name="batch_seq"))
    out, present = delta_rule(
        g, chunks, SIZES, given["query"], given["key"], given["value"], given["past"], given["decay"], given["beta"]
    )
    g.outputs({"out": out, "present": present})
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(g.model().SerializeToString(), options)


def drawn(tokens: int, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs; decays of each head about its own size, from 0.001 to 10, as trained models have them."""
    rng = np.random.default_rng(seed)
    unit = rng.standard_normal((2, batch, tokens, 2, SIZES.key_head_dim))
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    size = np.geomspace(1e-3, 10, HEADS) * rng.uniform(0.2, 2, (batch, tokens, HEADS))
    arrays = {
        "query": unit[0].reshape(batch, tokens, KEYS),
        "key": unit[1].reshape(batch, tokens, KEYS),
        "value": rng.standard_normal((batch, tokens, VALUES)),
        "decay": -size,
        "beta": rng.uniform(0, 1, (batch, tokens, HEADS)),
        "past": rng.standard_normal((batch, *STATE)),
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def recurrence(given: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token by token, in float64."""
    wide = {name: array.astype(np.float64) for name, array in given.items()}
    state, outs = wide["past"], []
    for token in range(given["query"].shape[1]):
        row = {name: wide[name][:, token] for name in INPUTS}
        query, key = (
            np.repeat(row[name].reshape(len(state), SIZES.num_key_heads, -1), HEADS // SIZES.num_key_heads, axis=1)
            for name in ("query", "key")
        )
        value = row["value"].reshape(len(state), HEADS, -1)
        state = state * np.exp(row["decay"])[..., None, None]
        new = (value - np.einsum("bhkv,bhk->bhv", state, key)) * row["beta"][..., None]
        state = state + np.einsum("bhk,bhv->bhkv", key, new)
        outs.append(np.einsum("bhkv,bhk->bhv", state, query).reshape(len(state), -1) * SIZES.key_head_dim**-0.5)
    return np.stack(outs, axis=1), state


def run(given: dict[str, np.ndarray], target: str = PORTABLE) -> tuple[np.ndarray, np.ndarray]:
    out, present = session(target).run(None, given)
    return out, present


def assert_near(got: tuple[np.ndarray, np.ndarray], expected: tuple[np.ndarray, np.ndarray], error: float) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=error * max(np.abs(other).max(), 1.0))


@pytest.mark.parametrize("target", [PORTABLE, TENSORRT])
@pytest.mark.parametrize("tokens", [1, 2, 5, 64, 127, 128, 129, 300, 700])
def test_values_are_those_of_the_recurrence(target, tokens):
    given = drawn(tokens)
    assert_near(run(given, target), recurrence(given), 2e-6)


def test_keys_that_are_all_alike_lose_no_digits():
    """Powers of A, with which (I + A)^-1 could also be made, pass 1e17 here."""
    given = drawn(130)
    given["key"][:] = given["key"][:, :1]
    given["beta"][:], given["decay"][:] = 1.0, -1e-4
    assert_near(run(given), recurrence(given), 5e-6)


def test_strong_and_weak_decays_in_one_chunk_lose_no_digits():
    """Sums over a whole chunk, -600 here, would round what a few of its tokens decay by."""
    given = drawn(LINEAR_CHUNK)
    given["decay"][:, :30], given["decay"][:, 30:] = -20.0, -1e-4
    assert_near(run(given), recurrence(given), 2e-6)


def test_a_prompt_in_parts_ends_in_the_state_of_the_whole(target=PORTABLE):
    given = drawn(200)
    whole, state = run(given, target)
    outs, past = [], given["past"]
    for part in (slice(0, 70), slice(70, 71), slice(71, 72), slice(72, 200)):
        out, past = run({name: given[name][:, part] for name in INPUTS} | {"past": past}, target)
        outs.append(out)
    assert_near((np.concatenate(outs, axis=1), past), (whole, state), 2e-6)


def test_zeros_in_front_leave_a_state_of_zeros_as_it_is():
    given = drawn(70)
    given["past"][:] = 0
    padded = {name: np.concatenate([np.zeros_like(given[name][:, :9]), given[name]], axis=1) for name in INPUTS}
    padded["decay"][:, :9], padded["beta"][:, :9] = -0.7, 0.5  # which a token of zeros has too
    out, state = run(padded | {"past": given["past"]})
    assert not out[:, :9].any()
    assert_near((out[:, 9:], state), run(given), 2e-6)


def test_the_longest_prompt_reads_the_state_before_it():
    """One value is written by the first token, and never again: the last chunk still finds it."""
    shapes = {"query": KEYS, "key": KEYS, "value": VALUES, "decay": HEADS, "beta": HEADS}
    given = {name: np.zeros((1, MAX_LINEAR_TOKENS, size), np.float32) for name, size in shapes.items()}
    given["past"] = np.zeros((1, *STATE), np.float32)
    for name in ("key", "query"):
        given[name][:, :, :: SIZES.key_head_dim] = 1
    given["value"][:, 0], given["beta"][:, 0] = 3.0, 1.0
    out, state = run(given)
    np.testing.assert_allclose(out, np.full_like(out, 3 / SIZES.key_head_dim**0.5), rtol=1e-5)
    np.testing.assert_allclose(state[0, :, 0], np.full((HEADS, SIZES.value_head_dim), 3.0), rtol=1e-5)
    assert MAX_LINEAR_TOKENS == 129 * LINEAR_CHUNK
