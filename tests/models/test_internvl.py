"""InternVL3 and 3.5 from checkpoint to answer: unpruned against transformers, pruned against our oracle in it."""

import json
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from PIL import Image

import internvl
from export.__main__ import main as export
from hawk_trt import ModelInputs, Pipeline, PruningConfig, Request
from hawk_trt.apps.cli.main import main as hawk
from hawk_trt.apps.serve.batcher import Batcher
from hawk_trt.bundle import Bundle
from hawk_trt.errors import InvalidInput
from hawk_trt.pruning.hawk import head_scores, normalize, num_kept
from hawk_trt.runtime.trace import traced
from hawk_trt.stages import NORMALIZATIONS
from internvl import CHECKPOINTS, CONTEXT, END, IM_END, START, TILE_PX, TILE_TOKENS, VIDEO, tensors, theirs
from pictures import noise
from served import ask, assert_served_as_alone
from targets import ON_CPU
from trt_machine import Machines, engine_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from hawk_trt.apps.parity.prompt_rules import prompt_tokens  # noqa: E402 - these need torch
from hawk_trt.apps.parity.reference import Reference  # noqa: E402

STEPS = 6
# Tiles of each image or frame; a frame is one tile and has text before it.
PROMPTS = {"one image": [7], "several images": [3, 1, 5], "video": [1] * 6, "none": []}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return internvl.export_all(tmp_path_factory.mktemp("internvl"))


@pytest.fixture(scope="module", params=["layer_norm", "qwen3"])
def checkpoint(request, folder):
    """One of each language side: InternVL3's and InternVL3.5's."""
    return folder / request.param


@pytest.fixture(scope="module")
def bundle(checkpoint):
    return checkpoint.with_suffix(".bundle")


@pytest.fixture(scope="module", params=ON_CPU)
def pipe(request, bundle):
    with Pipeline.load(bundle, target=request.param, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)


def load(checkpoint):
    model = transformers.InternVLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    return model.eval()


@cache
def reference_of(checkpoint, normalization="l2"):
    return Reference.load(checkpoint, head_weights=(0.25,) * 4, normalization=normalization)


def oracle(checkpoint, pipe, inputs, pruning, normalization="l2"):
    reference = reference_of(checkpoint, normalization)
    return reference.run(reference.embed(inputs, prompt_tokens(pipe.bundle)), pruning, steps=STEPS)


def ours(pipe, rows, pruning):
    options = {"pruning": pruning, "max_new_tokens": STEPS, "ignore_eos": True, "return_logits": True}
    return pipe.generate_batch(rows, **options) if len(rows) > 1 else [pipe.generate(rows[0], **options)]


@pytest.mark.parametrize("tower", CHECKPOINTS)
@pytest.mark.parametrize("target", ON_CPU)
def test_the_vision_graph_equals_the_tower(folder, tower, target):
    pixels = np.random.default_rng(0).standard_normal((3, 3, TILE_PX, TILE_PX), dtype=np.float32)
    with torch.inference_mode():
        features = load(folder / tower).model.get_image_features(torch.from_numpy(pixels)).pooler_output
    session = ort.InferenceSession(folder / f"{tower}.bundle" / f"vision.{target}.onnx")
    (embeds,) = session.run(None, {"pixel_values": pixels})
    np.testing.assert_allclose(embeds, features.flatten(0, 1).numpy(), rtol=0, atol=2e-5)
    assert np.abs(embeds).max() > 1


@pytest.mark.parametrize("runs", PROMPTS.values(), ids=PROMPTS)
def test_unpruned_tokens_are_those_of_transformers(pipe, model, runs):
    inputs = tensors(runs)
    (tokens,), (logits,) = theirs(model, [inputs], STEPS)
    (result,) = ours(pipe, [inputs], PruningConfig(keep_ratio=1.0))
    assert result.token_ids == tokens
    np.testing.assert_allclose(result.logits, logits, rtol=0, atol=1e-3)
    assert result.num_visual == result.num_kept == TILE_TOKENS * sum(runs)


def test_an_unpruned_batch_of_unlike_prompts_is_that_of_transformers(pipe, model):
    rows = [tensors(runs, seed) for seed, runs in enumerate(PROMPTS.values())]
    tokens, logits = theirs(model, rows, STEPS)
    for row, result in enumerate(ours(pipe, rows, PruningConfig(keep_ratio=1.0))):
        assert result.token_ids == tokens[row]
        np.testing.assert_allclose(result.logits, logits[row], rtol=0, atol=1e-3)


def assert_is_the_oracles(result, trace):
    assert tuple(result.token_ids) == trace.tokens
    np.testing.assert_array_equal(result.kept_indices, trace.kept_indices)
    np.testing.assert_allclose(result.scores, trace.scores, rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.logits, trace.logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("runs", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize(
    "pruning",
    [
        PruningConfig(keep_ratio=0.2),
        PruningConfig(keep_ratio=0.6, head_weights=(0.9, 0.0, 0.1, 0.4)),
        PruningConfig(keep_ratio=0.4, quota="per-image"),
    ],
    ids=["0.2", "0.6, weights", "0.4, per image"],
)
def test_pruned_tokens_are_those_of_the_oracle(checkpoint, pipe, runs, pruning):
    inputs = tensors(runs)
    (result,) = ours(pipe, [inputs], pruning)
    assert_is_the_oracles(result, oracle(checkpoint, pipe, inputs, pruning))
    if runs and pruning.quota == "global":
        assert result.num_kept == num_kept(TILE_TOKENS * sum(runs), pruning.keep_ratio, 1)


def test_a_pruned_batch_is_the_oracles_row_by_row(checkpoint, pipe):
    rows = [tensors(runs, seed) for seed, runs in enumerate(PROMPTS.values())]
    pruning = PruningConfig(keep_ratio=0.3)
    for inputs, result in zip(rows, ours(pipe, rows, pruning), strict=True):
        assert_is_the_oracles(result, oracle(checkpoint, pipe, inputs, pruning))


@pytest.mark.parametrize("keep_ratio", [0.2, 0.7])
def test_scores_and_kept_tokens_are_those_of_the_numpy_oracle(pipe, model, keep_ratio):
    inputs = tensors([4, 1, 3])
    trace = traced(pipe, inputs, PruningConfig(keep_ratio=keep_ratio), [])
    language, visual = model.model.language_model, inputs.input_ids == CONTEXT
    with torch.inference_mode():
        embeds = language.embed_tokens(torch.from_numpy(inputs.input_ids)).numpy()
    embeds[visual] = trace.visual_embeds
    layer = language.layers[0]

    def numbers(name, part="weight"):
        found = getattr(getattr(layer.self_attn, name, None), part, None)
        return None if found is None else found.detach().numpy()

    q_proj, k_proj = ((numbers(name), numbers(name, "bias")) for name in ("q_proj", "k_proj"))
    norms = (numbers("q_norm"), numbers("k_norm"))
    qwen3 = model.config.text_config.model_type == "qwen3"
    assert qwen3 == (norms[0] is not None) == (q_proj[1] is None)
    query, norm = pipe.processor.layout(inputs).query_weights, layer.input_layernorm.weight.detach().numpy()
    raw = head_scores(embeds, query, norm, 1e-6, q_proj, k_proj, 4, 2, norms if qwen3 else None)
    scores = 0.25 * normalize(raw, visual, "l2").sum(axis=0)[visual]
    np.testing.assert_allclose(trace.scores, scores, rtol=0, atol=1e-6)
    best = np.argsort(-scores, kind="stable")[: num_kept(visual.sum(), keep_ratio, 1)]
    kept = np.flatnonzero(visual)[np.sort(best)]
    np.testing.assert_array_equal(trace.kept_indices[visual[trace.kept_indices]], kept)


def test_padding_and_a_masked_image_are_those_of_the_oracle(checkpoint, pipe):
    inputs = tensors([2, 3])
    ids = np.concatenate([np.zeros(5, np.int64), inputs.input_ids])
    mask = np.arange(len(ids)) >= 5
    first = int(np.flatnonzero(ids == START)[0])
    mask[first : first + 2 + 2 * TILE_TOKENS] = False
    masked = ModelInputs(ids, mask.astype(np.int64), inputs.pixel_values)
    pruning = PruningConfig(keep_ratio=0.4)
    (result,) = ours(pipe, [masked], pruning)
    assert_is_the_oracles(result, oracle(checkpoint, pipe, masked, pruning))
    assert result.num_visual == 3 * TILE_TOKENS


@pytest.mark.parametrize("normalization", NORMALIZATIONS[1:])
def test_other_normalizations_are_those_of_the_oracle(checkpoint, tmp_path, normalization):
    out = str(tmp_path / "bundle")
    assert export([str(checkpoint), "--out", out, "--normalization", normalization]) == 0
    inputs, pruning = tensors([4, 2]), PruningConfig(keep_ratio=0.3)
    with Pipeline.load(out, threads=1) as pipe:
        (result,) = ours(pipe, [inputs], pruning)
    assert_is_the_oracles(result, oracle(checkpoint, pipe, inputs, pruning, normalization))


def test_kept_tokens_keep_their_positions_on_the_one_axis(checkpoint, pipe):
    trace = oracle(checkpoint, pipe, tensors([5]), PruningConfig(keep_ratio=0.3))
    np.testing.assert_array_equal(trace.kept_position_ids, trace.kept_indices[None])
    layout = pipe.processor.layout(tensors([5]))
    np.testing.assert_array_equal(layout.position_ids, np.arange(layout.num_tokens)[None])


def test_the_query_begins_behind_the_end_of_the_last_image(pipe):
    inputs = tensors([2, 3])
    asked = np.flatnonzero(pipe.processor.layout(inputs).query_weights)
    last_end = int(np.flatnonzero(inputs.input_ids == END)[-1])
    im_end = int(np.flatnonzero(inputs.input_ids == IM_END)[-1])
    assert asked.tolist() == list(range(last_end + 1, im_end))


def test_prompts_become_the_ids_and_tiles_that_transformers_makes(checkpoint, pipe):
    frames = [noise(40, 60, 60), noise(40, 60, 60), noise(40, 60, 60)]
    content = [
        {"type": "text", "text": "First:"},
        {"type": "video", "video": frames},
        {"type": "image", "image": noise(60, 112, 112)},
        {"type": "text", "text": "and"},
        {"type": "image", "image": noise(50, 50, 50)},
        {"type": "text", "text": "What is red?"},
    ]
    inputs = pipe.prepare([{"role": "user", "content": content}])

    # their processor cannot be made here, since it needs torchvision; these are its own rules of text
    processor = transformers.models.internvl.processing_internvl.InternVLProcessor
    marks = SimpleNamespace(start_image_token="<img>", end_image_token="</img>")
    marks.image_token, marks.image_seq_length = "<IMG_CONTEXT>", TILE_TOKENS
    tiles = [3, 1]
    shown = [processor.replace_image_token(marks, {"num_patches": tiles}, index) for index in range(2)]
    played = processor.replace_video_token(marks, {"pixel_values_videos": [np.zeros((3, 1))]}, 0)
    text = (
        f"<|im_start|>user\nFirst:{played}\n{shown[0]}\nand{shown[1]}\nWhat is red?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))
    assert inputs.input_ids.tolist() == tokenizer.encode(text, add_special_tokens=False)
    assert "Frame2: " in text

    # all tiles in the order of the prompt: three frames, the first image's two tiles and thumbnail, the second's one
    assert inputs.pixel_values.shape == (3 + 3 + 1, 3, TILE_PX, TILE_PX)
    assert inputs.image_grid_thw is None
    family = pipe.family
    preprocessor = (checkpoint / "preprocessor_config.json").read_text()
    settings = family.image_settings(json.loads(preprocessor))
    clip = family.video_to_patches(frames, settings)
    np.testing.assert_array_equal(inputs.pixel_values[:3], clip.pixel_values)
    images = family.images_to_patches([noise(60, 112, 112), noise(50, 50, 50)], settings)
    np.testing.assert_array_equal(inputs.pixel_values[3:], images.pixel_values)


def test_the_vision_cache_knows_each_image_and_frame_by_its_tiles(bundle, pipe):
    images = [noise(60, 112), noise(50, 50)]
    frames = [noise(40, 60), noise(40, 60, 1), noise(40, 60)]
    pipe.vision_cache.clear()
    ask = {"pruning": PruningConfig(keep_ratio=0.3), "max_new_tokens": STEPS, "return_logits": True}
    with Pipeline.load(bundle, target=pipe.backend.target, vision_cache_mb=0, threads=1) as plain:
        for shown, num_cached in ((images[:1], 1), (images[::-1], 4)):  # a frame comes twice, later all but one image
            got, expected = (p.generate("What is red?", shown, [frames], **ask) for p in (pipe, plain))
            assert (got.num_cached, got.token_ids) == (num_cached, expected.token_ids)
            np.testing.assert_array_equal(got.kept_indices, expected.kept_indices)
            np.testing.assert_allclose(got.logits, expected.logits, rtol=0, atol=1e-4)


def test_max_pixels_bounds_the_tiles_of_a_prompt(pipe):
    image = noise(200, 400, 400)
    free = pipe.prepare("?", [image])
    bounded = pipe.prepare("?", [image], max_pixels=3 * TILE_PX**2)
    assert len(free.pixel_values) == 9
    assert len(bounded.pixel_values) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda inputs: replace(inputs, input_ids=np.delete(inputs.input_ids, 10)),
            "input_ids: image 0: got 11 placeholders in a row, expected a multiple of 4, the tokens of a tile",
        ),
        (
            lambda inputs: replace(inputs, pixel_values=inputs.pixel_values[:-1]),
            r"pixel_values: got \[4, 3, 56, 56\], expected float32\[5, 3, 56, 56\]: the placeholders are of \[3, 2\]",
        ),
        (
            lambda inputs: replace(inputs, pixel_values=None),
            r"pixel_values: got none, expected float32\[5, 3, 56, 56\]",
        ),
        (
            lambda inputs: replace(inputs, image_grid_thw=np.array([[5, 4, 4]])),
            "image_grid_thw: got it, expected None: InternVL takes all tiles in pixel_values",
        ),
        (
            lambda inputs: replace(inputs, input_ids=np.append(inputs.input_ids, VIDEO)),
            "got a <video> placeholder, expected each frame as <img>",
        ),
        (
            lambda inputs: ModelInputs(np.array([1, 2, 3]), pixel_values=inputs.pixel_values),
            r"expected float32\[0, 3, 56, 56\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(pipe, change, message):
    with pytest.raises(InvalidInput, match=message):
        pipe.generate(change(tensors([3, 2])), max_new_tokens=1)


def test_a_server_answers_unlike_prompts_side_by_side_as_alone(pipe):
    jobs = [
        ask(tensors(runs, seed=n), PruningConfig((0.3, 1.0)[n % 2]), 4 + 5 * n, ignore_eos=True, return_logits=True)
        for n, runs in enumerate([*PROMPTS.values(), [2], [4]])
    ]
    with Batcher(pipe) as batcher:
        assert_served_as_alone(pipe, batcher, jobs)


def test_a_batch_of_prompts_equals_its_rows_one_by_one(pipe):
    requests = [
        Request("What is red?", [noise(90, 200, 200)]),
        Request("Hello?"),
        Request("Which?", [noise(60, 50, 50), noise(300, 60, 60)]),
        Request("When?", videos=[[noise(60, 60, 60)] * 4]),
    ]
    options = {"pruning": PruningConfig(keep_ratio=0.3), "max_new_tokens": 5, "return_logits": True}
    for request, result in zip(requests, pipe.generate_batch(requests, **options), strict=True):
        alone = pipe.generate(request.prompt, request.images, request.videos, **options)
        assert alone.token_ids == result.token_ids
        np.testing.assert_array_equal(alone.kept_indices, result.kept_indices)
        np.testing.assert_allclose(alone.logits, result.logits, rtol=0, atol=1e-4)


def test_the_graphs_are_well_formed_in_every_dtype(folder, tmp_path):
    halves = [tmp_path / f"{name}-{dtype}" for name in ("rms_norm", "qwen3") for dtype in ("float16", "bfloat16")]
    for half in halves:
        name, dtype = half.name.split("-")
        assert export([str(folder / name), "--out", str(half), "--dtype", dtype]) == 0
    for bundle in (*(folder / f"{name}.bundle" for name in CHECKPOINTS), *halves):
        for file in sorted(bundle.glob("*.onnx")):
            onnx.checker.check_model(file, full_check=True)
            graph = onnx.load(file, load_external_data=False).graph
            names = [node.name for node in graph.node]
            assert len(set(names)) == len(names) and all(names)
        (entry,) = (g for g in Bundle.load(bundle).manifest.graphs if (g.stage, g.target) == ("vision", "portable"))
        assert entry.inputs[0].shape == ("num_tiles", 3, TILE_PX, TILE_PX)


def test_float16_stays_near_float32(checkpoint, bundle, tmp_path):
    assert export([str(checkpoint), "--out", str(tmp_path / "half"), "--dtype", "float16"]) == 0
    inputs, pruning = tensors([3, 2]), PruningConfig(keep_ratio=1.0)
    results = []
    for path in (bundle, tmp_path / "half"):
        with Pipeline.load(path, threads=1) as pipe:
            results.append(pipe.generate(inputs, pruning=pruning, max_new_tokens=1, return_logits=True))
    assert np.abs(results[0].logits - results[1].logits).max() < 0.05 * np.abs(results[0].logits).max()
    assert np.corrcoef(results[0].scores, results[1].scores)[0, 1] > 0.999


def test_parity_compares_the_bundle_with_the_checkpoint(checkpoint, bundle, capsys):
    options = ["--keep-ratio", "0.3", "--steps", "3", "--json"]
    assert hawk(["parity", str(bundle), "--checkpoint", str(checkpoint), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert {"two images", "video of 6 frames", "text only"} <= {case["name"] for case in report["cases"]}


def test_the_picture_shows_the_tiles_of_an_image(folder, tmp_path, capsys):
    Image.fromarray(noise(90, 200, 200)).save(tmp_path / "image.png")
    options = ["--image", str(tmp_path / "image.png"), "--prompt", "What?", "--out", str(tmp_path / "explain.png")]
    assert hawk(["explain", str(folder / "layer_norm.bundle"), *options, "--keep-ratios", "0.3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [item["grid"] for item in report["items"]] == [[9, 2, 2]]
    (selection,) = report["selections"]
    assert np.sum(selection["kept"][0]) == selection["num_kept"] == 11
    with Image.open(tmp_path / "explain.png") as picture:
        assert picture.height > 9 * 100


@pytest.mark.parametrize("qwen3", [False, True])
def test_a_tied_checkpoint_needs_no_head_of_its_own(tmp_path, qwen3):
    checkpoint = internvl.save_checkpoint(tmp_path / "tied", tied=True, seed=1, qwen3=qwen3)
    assert not any("lm_head" in name for name in internvl.load_file(checkpoint / "model.safetensors"))
    assert export([str(checkpoint), "--out", str(tmp_path / "bundle")]) == 0
    inputs = tensors([2])
    (tokens,), (logits,) = theirs(load(checkpoint), [inputs], STEPS)
    with Pipeline.load(tmp_path / "bundle", threads=1) as pipe:
        (result,) = ours(pipe, [inputs], PruningConfig(keep_ratio=1.0))
    assert result.token_ids == tokens
    np.testing.assert_allclose(result.logits, logits, rtol=0, atol=1e-3)


def test_engines_take_all_tiles_of_an_image_in_one_call(folder, tmp_path):
    bundle = folder / "layer_norm.bundle"
    engines = engine_folder(bundle, tmp_path / "engines", "tensorrt")
    image = np.random.default_rng(0).integers(0, 256, (200, 320, 3), np.uint8)
    with Machines() as machines, Pipeline.load(engines) as plans, Pipeline.load(bundle, threads=1) as pipe:
        got, expected = (one.generate("What?", [image], max_new_tokens=3) for one in (plans, pipe))
        assert machines.trt.enqueues.count(("vision", 0)) == 1
    assert len(got.scores) > 2 * TILE_TOKENS and got.token_ids == expected.token_ids
    np.testing.assert_allclose(got.scores, expected.scores, rtol=0, atol=1e-6)
