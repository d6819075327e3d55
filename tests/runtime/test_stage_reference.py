"""The reference of a bundle: what it holds, that it is small, and that it is the same after a file."""

import shutil

import numpy as np
import pytest

from export import __main__ as command
from export.__main__ import _with_reference as make_reference
from hawk_trt.bundle import REFERENCE, Bundle
from hawk_trt.pipeline import Pipeline
from hawk_trt.runtime.reference import _STORED, STEPS, Reference, _sketch, condensed, tensor_prompts, trace


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        yield pipe


def test_a_trace_can_be_forced_to_tokens_and_to_a_choice_of_visual_tokens(pipe):
    inputs = tensor_prompts(pipe.bundle.manifest)["image 224x224"]
    free = trace(pipe, inputs)
    chosen = np.zeros(len(free.kept), np.bool_)
    chosen[: free.kept.sum()] = True
    assert not np.array_equal(free.kept, chosen)
    np.testing.assert_array_equal(trace(pipe, inputs, (), chosen).kept, chosen)
    forced = trace(pipe, inputs, free.tokens.tolist())
    np.testing.assert_array_equal(forced.logits, free.logits)
    assert not np.array_equal(trace(pipe, inputs, [5] * STEPS).logits[1], free.logits[1])


def test_the_prompts_are_the_same_every_time(pipe):
    first, second = (tensor_prompts(pipe.bundle.manifest) for _ in range(2))
    assert list(first) == ["image 224x224", "image 336x140", "two images", "text only", "video of 6 frames"]
    for name, inputs in first.items():
        np.testing.assert_array_equal(inputs.input_ids, second[name].input_ids)
        if inputs.pixel_values is not None:
            np.testing.assert_array_equal(inputs.pixel_values, second[name].pixel_values)


def test_a_reference_is_small_and_the_same_after_a_file(pipe, tiny_bundle, tmp_path):
    made = Reference.make(pipe)
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    made.put_into(tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle", verify=True)
    assert bundle.manifest.files[REFERENCE].size_bytes < 300_000 and not bundle.manifest.files[REFERENCE].weights
    read = Reference.load(tmp_path / "bundle" / REFERENCE)
    assert (read.made_by, read.model, read.weights) == (made.made_by, made.model, made.weights)
    assert list(read.prompts) == list(made.prompts)
    for name, expected in made.prompts.items():
        for field in _STORED:
            np.testing.assert_array_equal(getattr(read.prompts[name], field), getattr(expected, field), err_msg=field)
    made.put_into(tmp_path / "bundle")  # again, in its own place
    Bundle.load(tmp_path / "bundle", verify=True)


def test_the_export_command_writes_it_for_float32_and_only_once(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_with_reference", make_reference)
    out = tmp_path / "bundle"
    options = [str(tiny_checkpoint), "--out", str(out), "--target", "cpu"]
    assert command.main([*options, "--no-reference"]) == 0 and not (out / REFERENCE).exists()
    assert command.main(options) == 0 and "up to date" in capsys.readouterr().out
    assert Bundle.load(out, verify=True).manifest.files[REFERENCE].size_bytes == (out / REFERENCE).stat().st_size
    written = (out / REFERENCE).stat().st_mtime_ns
    assert command.main(options) == 0 and (out / REFERENCE).stat().st_mtime_ns == written
    assert command.main([*options, "--dtype", "float16"]) == 0 and not (out / REFERENCE).exists()


def test_too_little_memory_for_it_is_said_and_leaves_the_bundle_as_it_is(tiny_bundle, monkeypatch, capsys):
    monkeypatch.setattr(command, "available_memory_bytes", lambda: 10**9)
    bundle = Bundle.load(tiny_bundle)
    assert make_reference(bundle) is bundle
    assert "note: reference.npz" in (told := capsys.readouterr().err) and "takes 1.1 GB of memory, 1.0 GB" in told


def test_the_logits_that_are_kept_are_the_most_probable_and_some_others(pipe):
    full = trace(pipe, tensor_prompts(pipe.bundle.manifest)["text only"])
    kept = condensed(full)
    assert set(full.tokens) <= set(kept.logit_ids)
    np.testing.assert_array_equal(kept.logits, full.logits[:, kept.logit_ids])
    full.logits[2, 7] = np.nan  # of a token that may not be among them
    assert np.isnan(condensed(full, kept.logit_ids[kept.logit_ids != 7]).logits[2]).all()


def test_a_sketch_keeps_lengths_and_angles():
    random = np.random.default_rng(0)
    rows = random.standard_normal((40, 2048)).astype(np.float32)
    other = (rows + 0.1 * random.standard_normal(rows.shape)).astype(np.float32)
    a, b = _sketch(rows), _sketch(other)
    assert a.shape == (40, 64)
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(rows, axis=1), rtol=0.4)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert (cosine > 0.98).all() and (cosine < 0.999).all()
    np.testing.assert_array_equal(_sketch(rows[:, :64]), rows[:, :64])
