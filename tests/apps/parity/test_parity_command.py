"""hawk-trt parity on bundles of the tiny models: both sides agree, and what is wrong is found at its stage."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import golden
from export.__main__ import main as export_main
from hawk_trt.apps.cli.main import main
from hawk_trt.apps.parity.prompt_rules import prompt_tokens
from hawk_trt.apps.parity.report import compare_case
from hawk_trt.bundle import Bundle
from hawk_trt.pipeline import Pipeline
from hawk_trt.request import PruningConfig
from hawk_trt.runtime import reference as stage_reference
from hawk_trt.runtime.comparison import TOLERANCES

pytest.importorskip("torch")
pytest.importorskip("transformers")
from hawk_trt.apps.parity.reference import Reference


@pytest.fixture(scope="module")
def tensor_bundle(tmp_path_factory):
    """A bundle without tokenizer, normalised by softmax."""
    folder = tmp_path_factory.mktemp("bundles") / "random"
    options = ["--normalization", "softmax", "--im-end-token-id", "501", "--vision-end-token-id", "503"]
    assert export_main([str(golden.MODEL), "--out", str(folder), *options]) == 0
    return folder


def test_a_bundle_agrees_with_its_checkpoint(tiny_bundle, tiny_checkpoint, capsys):
    assert main(["parity", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--json", "--steps", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and report["dtype"] == "float32"
    names = [(case["name"], case["keep_ratio"]) for case in report["cases"]]
    assert len(names) == len(set(names)) == 9  # four with visual tokens at two ratios, one without
    assert all(case["tokens"]["tokens_equal"] for case in report["cases"])
    two_images = next(case for case in report["cases"] if case["name"] == "two images")
    assert [stage["stage"] for stage in two_images["stages"]] == ["vision", "scores", "first_layer", "decoder"]
    assert two_images["selection"]["num_kept"] == 12 and two_images["selection"]["overlap"] == 1.0


@pytest.mark.parametrize(
    "options",
    [
        ["--query", "turn"],
        ["--query", "last"],
        ["--quota", "per-image", "--min-visual-tokens", "5"],
        ["--quota", "per-frame"],
    ],
)
@pytest.mark.parametrize("target", ["portable", "cpu"])
def test_every_way_to_prune_agrees(tiny_bundle, tiny_checkpoint, capsys, options, target):
    command = ["parity", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--keep-ratio", "0.3"]
    assert main([*command, "--steps", "2", "--target", target, *options]) == 0
    assert "in tolerance" in capsys.readouterr().out


def test_given_images_and_prompts_are_cases(tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    images = []
    for name, size in (("wide.png", (90, 200)), ("small.png", (56, 56))):
        images.append(str(tmp_path / name))
        Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)).save(images[-1])
    command = ["parity", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--keep-ratio", "0.2", "--json"]
    prompts = ["--prompt", "What colour is it?", "--prompt", "How many?", "--steps", "2"]
    assert main([*command, *prompts, "--images", *images]) == 0
    names = [case["name"] for case in json.loads(capsys.readouterr().out)["cases"]]
    assert names == [f"{image}, prompt {n}" for n in (1, 2) for image in ("wide.png", "small.png")]
    assert main([*command, *prompts[2:], "--images", *images, "--together"]) == 0
    (case,) = json.loads(capsys.readouterr().out)["cases"]
    assert case["name"] == "wide.png, small.png"


def test_a_float32_bundle_that_agrees_gives_its_reference_to_others(tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    other = tmp_path / "bfloat16"
    assert export_main([str(tiny_checkpoint), "--out", str(other), "--dtype", "bfloat16"]) == 0
    command = ["parity", str(tiny_bundle), "--checkpoint", str(tiny_checkpoint), "--keep-ratio", "1", "--steps", "1"]
    assert main([*command, "--save", str(other)]) == 0
    assert "reference.npz: written" in capsys.readouterr().err
    bundle = Bundle.load(other, verify=True)
    reference = stage_reference.Reference.load(other / "reference.npz")
    reference.check(bundle.manifest)
    assert reference.made_by == "tiny-vlm, float32, onnxruntime on cpu"
    assert main(["parity", str(other), "--checkpoint", str(tiny_checkpoint), "--save", str(other)]) == 1
    assert "--save: got a bfloat16 bundle, a reference is made in float32" in capsys.readouterr().err


def test_a_float16_bundle_agrees_within_its_own_tolerance(tiny_checkpoint, tmp_path, capsys):
    assert export_main([str(tiny_checkpoint), "--out", str(tmp_path / "half"), "--dtype", "float16"]) == 0
    capsys.readouterr()
    options = ["--keep-ratio", "0.1", "0.3", "--steps", "4", "--json"]
    assert main(["parity", str(tmp_path / "half"), "--checkpoint", str(tiny_checkpoint), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dtype"] == "float16"
    errors = [row["max_error_share"] for case in report["cases"] for row in case["stages"]]
    assert max(errors) > TOLERANCES["float32"].decoder.max_error  # it is not a float32 run in disguise


def test_a_bundle_without_tokenizer_agrees_on_tensors(tensor_bundle, capsys):
    assert (
        main(["parity", str(tensor_bundle), "--checkpoint", str(golden.MODEL), "--keep-ratio", "0.4", "--steps", "2"])
        == 0
    )
    assert "video of 6 frames, keep ratio 0.4" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["vision", "first_layer", "decoder"])
def test_wrong_weights_are_out_of_tolerance_at_their_stage(tensor_bundle, tmp_path, capsys, stage):
    folder = tmp_path / "changed"
    shutil.copytree(tensor_bundle, folder)
    weights = np.fromfile(folder / f"{stage}.data", dtype=np.float32)
    (weights * np.float32(1.001)).tofile(folder / f"{stage}.data")
    options = ["--keep-ratio", "0.4", "--steps", "2", "--json"]
    assert main(["parity", str(folder), "--checkpoint", str(golden.MODEL), *options]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["passed"]
    for case in report["cases"]:
        if case["selection"] is not None:
            out = [row["stage"] for row in case["stages"] if row["failures"]]
            assert stage in out
            assert out[0] == stage or (out[0], stage) == ("scores", "first_layer")


def test_after_a_wrong_choice_the_stages_are_compared_over_the_same_tokens(tensor_bundle):
    class Misled:
        """A bundle that scores with one head only."""

        def __init__(self, pipe):
            self.pipe = pipe

        def generate(self, inputs, pruning, **options):
            return self.pipe.generate(inputs, pruning=replace(pruning, head_weights=(1, 0, 0, 0)), **options)

        def scheduler(self):
            scheduler = self.pipe.scheduler()
            add = scheduler.add
            scheduler.add = lambda request: add(
                replace(request, pruning=replace(request.pruning, head_weights=(1, 0, 0, 0)))
            )
            return scheduler

        def __getattr__(self, name):
            return getattr(self.pipe, name)

    with Pipeline.load(tensor_bundle, threads=1) as pipe:
        manifest = pipe.bundle.manifest
        reference = Reference.load(
            golden.MODEL, head_weights=manifest.head_weights.values, normalization=manifest.normalization
        )
        case = "image", stage_reference.tensor_prompts(manifest, 3)["image 224x224"]
        embedded = reference.embed(case[1], prompt_tokens(pipe.bundle))
        pruning = PruningConfig(keep_ratio=0.3)
        right = compare_case(pipe, reference, case, embedded, pruning, 3, TOLERANCES["float32"])
        wrong = compare_case(Misled(pipe), reference, case, embedded, pruning, 3, TOLERANCES["float32"])
    assert right.failures == ()
    assert 0 < wrong.selection.overlap < 1 and wrong.selection.failures
    assert [row.stage for row in wrong.stages if row.failures] == ["scores"]
    assert wrong.tokens.failures == ()


def test_other_head_weights_go_to_both_sides(tensor_bundle, capsys, tmp_path):
    path = tmp_path / "weights.json"
    path.write_text("[1, 0.5, 0, 2]")
    command = ["parity", str(tensor_bundle), "--checkpoint", str(golden.MODEL), "--keep-ratio", "0.4", "--steps", "1"]
    assert main([*command, "--head-weights", str(path)]) == 0
    assert "in tolerance" in capsys.readouterr().out


def test_missing_torch_names_the_extra(tensor_bundle, tiny_checkpoint):
    code = f"""
import sys
sys.modules["torch"] = None
from hawk_trt.apps.cli.main import main
sys.exit(main(["parity", {str(tensor_bundle)!r}, "--checkpoint", {str(tiny_checkpoint)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "pip install torch transformers safetensors" in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--checkpoint", str(golden.MODEL), "--prompt", "Hello"], "no tokenizer"),
        (["--checkpoint", str(golden.MODEL), "--query", "turn"], "--query paper"),
        (["--checkpoint", str(golden.MODEL), "--steps", "0"], "--steps"),
        (["--checkpoint", str(golden.MODEL), "--keep-ratio", "2"], "keep_ratio"),
        (["--checkpoint", str(golden.MODEL), "--reference-device", "nothing"], "nothing"),
    ],
)
def test_what_cannot_be_compared_is_one_line_of_error(tensor_bundle, capsys, options, said):
    assert main(["parity", str(tensor_bundle), *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err
    errors = [line.startswith("error: ") for line in captured.err.splitlines()]
    assert any(errors[-2:]) and sum(errors) == 1  # a command to try may follow
