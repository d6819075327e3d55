"""Calibration: leaving heads out, planted importance, and runs that are killed."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from examples.tiny_task import generate
from export.__main__ import main as export
from export.bare_bundle import open_checkpoint
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.apps.cli.main import main
from hawk_trt.apps.evaluate.calibration import BASELINE, Plan, Scores, Source, Unit, score_table, units_left
from hawk_trt.apps.evaluate.datasets import Sample, load_dataset
from hawk_trt.apps.parity.prompt_rules import PromptTokens, prompt_tokens
from hawk_trt.bundle import read_manifest
from hawk_trt.pruning.head_weights import read_head_weights
from killed import kill_twice

pytest.importorskip("torch")
pytest.importorskip("transformers")
from hawk_trt.apps.evaluate.calibration_worker import Worker, answer, without_heads
from hawk_trt.apps.parity.reference import Reference

HEADS = 8
HEAD_DIM = 32
PLANTED = 5
QUESTIONS = 4
WHOLE = PruningConfig(keep_ratio=1.0)


def silenced(checkpoint, folder, heads, layers):
    """A copy of the checkpoint in whose layers these heads reach nothing: their columns of o_proj are 0."""
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, folder)
    tensors = dict(load_file(folder / "model.safetensors"))
    for layer in layers:
        name = next(name for name in tensors if name.endswith(f"layers.{layer}.self_attn.o_proj.weight"))
        weight = tensors[name].copy()
        for head in heads:
            weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0
        tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def plan(checkpoint, scope="first-layer", dataset="tiny", count=QUESTIONS):
    questions = tuple(load_dataset(str(dataset), count, 7))
    source = Source("questions", questions, "", 7, "exact-match")
    return Plan(checkpoint, (source,), scope, open_checkpoint, Reference.load, prompt_tokens, max_new_tokens=6)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Pictures of the tiny task in a folder; each test writes its own samples.jsonl beside copies of them."""
    folder = tmp_path_factory.mktemp("pictures")
    made = list(generate(7, QUESTIONS))
    for number, sample in enumerate(made):
        Image.fromarray(sample.image).save(folder / f"{number}.png")
    return folder, [sample.question for sample in made]


def write_dataset(questions, path, answers):
    folder, texts = questions
    lines = [
        json.dumps({"id": f"q{n}", "image": str(folder / f"{n}.png"), "question": text, "answer": answer})
        for n, (text, answer) in enumerate(zip(texts, answers, strict=True))
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def planted(tiny_checkpoint, questions, tmp_path_factory):
    """A checkpoint of whose layer 0 one head alone reaches anything, and questions that it answers rightly."""
    folder = tmp_path_factory.mktemp("planted")
    others = [head for head in range(HEADS) if head != PLANTED]
    checkpoint = silenced(tiny_checkpoint, folder / "model", others, [0])
    unknown = write_dataset(questions, folder / "unknown.jsonl", ["?"] * QUESTIONS)
    worker = Worker(plan(checkpoint, dataset=unknown))
    # the file's order is shuffled by the seed: answers go back to their question by id
    said = [worker.do(Unit(0, number, (BASELINE,)))[1] for number in range(QUESTIONS)]
    answers = {scores.sample: scores.answers[0] for scores in said}
    dataset = write_dataset(questions, folder / "own.jsonl", [answers[f"q{n}"] for n in range(QUESTIONS)])
    return checkpoint, dataset


@pytest.mark.parametrize(("scope", "layers"), [("first-layer", [0]), ("all-layers", range(4))])
def test_a_head_left_out_is_a_head_whose_columns_of_o_proj_are_zero(tiny_checkpoint, tmp_path, scope, layers):
    ours = Worker(plan(tiny_checkpoint, scope))
    edited = Worker(plan(silenced(tiny_checkpoint, tmp_path / "edited", [2], layers)))
    for number in range(2):
        left_out = ours.do(Unit(0, number, (2,)))[1].answers
        assert left_out == edited.do(Unit(0, number, (BASELINE,)))[1].answers


def test_the_whole_models_answers_are_the_pipelines(tiny_checkpoint, tiny_bundle):
    worker = Worker(plan(tiny_checkpoint))
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        for number, sample in enumerate(generate(7, 3)):
            expected = pipe.generate(sample.question, [sample.image], pruning=WHOLE, max_new_tokens=6).text
            assert worker.do(Unit(0, number, (3, BASELINE)))[1].answers[1] == expected


@pytest.mark.parametrize("qwen3", [False, True])
def test_internvl_answers_as_its_bundle_does(tmp_path, qwen3):
    from internvl import save_checkpoint

    checkpoint = tmp_path / "model"
    save_checkpoint(checkpoint, qwen3=qwen3)
    assert export([str(checkpoint), "--out", str(tmp_path / "bundle")]) == 0
    worker = Worker(plan(checkpoint))
    with Pipeline.load(tmp_path / "bundle", threads=1) as pipe:
        for number, sample in enumerate(generate(7, 2)):
            expected = pipe.generate(sample.question, [sample.image], pruning=WHOLE, max_new_tokens=6).text
            assert worker.do(Unit(0, number, (BASELINE, 2)))[1].answers[0] == expected


def test_features_of_several_depths_reach_every_row(tmp_path):
    import torch
    import transformers

    from random_models import IM_END, IMAGE, TOKEN_IDS, VIDEO, VISION_END, VOCAB, prompt, save_random

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": VOCAB, "head_dim": 16}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48}
    config = transformers.Qwen3VLConfig(
        text_config=sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope},
        vision_config=vision | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1, 2]},
        **TOKEN_IDS,
    )
    checkpoint = save_random(transformers.Qwen3VLForConditionalGeneration(config), tmp_path / "model", 1)
    reference = Reference.load(checkpoint, head_weights=(0.25,) * 4, normalization="l2")
    tokens = PromptTokens(image=IMAGE, video=VIDEO, vision_end=VISION_END, im_start=None, im_end=IM_END)
    embedded = reference.embed(prompt(1536, images=[(1, 8, 12), (1, 4, 6)]), tokens)
    expected = list(reference.run(embedded, WHOLE, steps=5).tokens)
    with torch.inference_mode(), without_heads(reference, "first-layer", [BASELINE, 1, BASELINE]):
        rows = answer(reference, embedded, 3, 5, stop_tokens=())
    assert rows[0] == rows[2] == expected


def test_heads_side_by_side_answer_as_they_do_alone(tiny_checkpoint):
    worker = Worker(plan(tiny_checkpoint, "all-layers"))
    heads = tuple(range(BASELINE, HEADS))
    together = worker.do(Unit(0, 1, heads))[1].answers
    assert together == tuple(worker.do(Unit(0, 1, (head,)))[1].answers[0] for head in heads)
    assert len(set(together)) > 1


def test_neither_the_order_of_the_heads_nor_how_many_go_together_changes_the_scores(planted):
    checkpoint, dataset = planted
    worker = Worker(plan(checkpoint, dataset=dataset))
    work = plan(checkpoint, dataset=dataset, count=2)
    tables = []
    for at_once, backwards in ((9, False), (4, True)):
        units = list(units_left(work, [[]], HEADS, at_once))
        units = [Unit(u.source, u.number, u.heads[::-1]) for u in reversed(units)] if backwards else units
        tables.append(score_table(work.sources[0], [worker.do(unit)[1] for unit in units], HEADS))
    np.testing.assert_array_equal(*tables)


def test_units_left_are_those_that_no_record_holds(tiny_checkpoint):
    known = [Scores("a", (-1, 0), (1.0, 1.0), ("", "")), Scores("b", (-1, 0, 1, 2), (0.0,) * 4, ("",) * 4)]
    work = plan(tiny_checkpoint, count=1)
    source = replace(work.sources[0], questions=[Sample(name, "?", ("!",)) for name in "abc"])
    work = replace(work, sources=(source,))
    assert list(units_left(work, [known], 3, 3)) == [Unit(0, 0, (1, 2)), Unit(0, 2, (-1, 0, 1)), Unit(0, 2, (2,))]


def command(checkpoint, dataset, folder):
    return [
        *("calibrate", str(checkpoint), "--dataset", str(dataset), "--max-new-tokens", "6"),
        *("--heads-at-once", "3", "--work", str(folder / "work"), "--out", str(folder / "weights.json")),
    ]


@pytest.fixture(scope="module")
def uninterrupted(planted, tmp_path_factory):
    """The weights file of a run that nobody killed, and its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert main(command(*planted, folder)) == 0
    return folder / "weights.json"


def test_planted_importance_is_found(uninterrupted):
    found = json.loads(uninterrupted.read_text(encoding="utf-8"))
    assert found["values"] == [float(head == PLANTED) for head in range(HEADS)]
    assert found["differs_from_uniform"]
    assert found["intervals"][PLANTED][0] > 0.9
    assert found["datasets"][0]["baseline"] == 1.0
    assert found["datasets"][0]["samples"] == QUESTIONS


def test_a_run_killed_twice_ends_with_the_same_weights(planted, uninterrupted, tmp_path):
    log = tmp_path / "work" / "own.jsonl"
    argv = command(*planted, tmp_path)
    lines = kill_twice("hawk_trt.apps.cli.torch_model", log, 3, argv).count(b"\n")
    assert 1 + 5 <= lines < 1 + 3 * QUESTIONS
    with log.open("ab") as file:
        file.write(b'{"sample":"q0","heads":[0')  # what a kill within a write leaves
    assert main(argv) == 0
    assert (tmp_path / "weights.json").read_bytes() == uninterrupted.read_bytes()


def test_a_finished_run_goes_on_with_more_questions_and_measures_only_those(planted, tmp_path, capsys):
    argv = command(*planted, tmp_path)
    assert main([*argv, "--count", "2"]) == 0
    first = (tmp_path / "work" / "own.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*argv, "--count", "3"]) == 0
    assert "27 answers: 8 heads and the whole model; 18 known" in capsys.readouterr().err
    assert (tmp_path / "work" / "own.jsonl").read_bytes().startswith(first)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--scope", "all-layers"], "another scope"),
        (["--max-new-tokens", "5"], "another max_new_tokens"),
        (["--seed", "1"], "another dataset"),
        (["--metric", "anls"], "another metric"),
    ],
)
def test_results_of_another_kind_are_refused(planted, uninterrupted, capsys, change, named):
    assert main([*command(*planted, uninterrupted.parent), *change]) == 1
    err = capsys.readouterr().err
    assert named in err
    assert "Choose another --work" in err


def test_results_of_another_model_are_refused(tiny_checkpoint, planted, uninterrupted, capsys):
    assert main(command(tiny_checkpoint, planted[1], uninterrupted.parent)) == 1
    assert "another model" in capsys.readouterr().err


def test_the_fingerprint_belongs_to_the_weights_and_not_to_the_folder(tiny_checkpoint, tmp_path):
    fingerprint = open_checkpoint(tiny_checkpoint).manifest.source.fingerprint
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    assert open_checkpoint(copy).manifest.source.fingerprint == fingerprint
    other = silenced(tiny_checkpoint, tmp_path / "other", [7], [3])
    assert open_checkpoint(other).manifest.source.fingerprint != fingerprint


def test_two_runs_do_not_write_to_the_same_results(planted, tmp_path, capsys):
    import fcntl

    (tmp_path / "work").mkdir()
    with (tmp_path / "work" / f"{planted[1].stem}.jsonl").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert main(command(*planted, tmp_path)) == 1
    assert "another run is writing there" in capsys.readouterr().err


def test_the_weights_file_is_what_python_the_commands_and_the_export_take(
    planted, questions, uninterrupted, tiny_bundle, tmp_path, capsys
):
    one_hot = tuple(float(head == PLANTED) for head in range(HEADS))
    weights = read_head_weights(uninterrupted)
    assert PruningConfig(head_weights=weights.values).head_weights == one_hot
    assert weights.source.startswith("hawk-trt calibrate: model (")
    assert export([str(planted[0]), "--out", str(tmp_path / "b"), "--head-weights", str(uninterrupted)]) == 0
    manifest = read_manifest(tmp_path / "b")
    assert (manifest.head_weights.values, manifest.head_weights.source) == (one_hot, weights.source)
    picture = str(questions[0] / "0.png")
    ask = ["run", str(tiny_bundle), "--image", picture, "--prompt", "What colour is the ring?", "--json"]
    capsys.readouterr()
    assert main([*ask, "--head-weights", str(uninterrupted)]) == 0
    ours = json.loads(capsys.readouterr().out)["scores"]
    assert main(ask) == 0
    assert json.loads(capsys.readouterr().out)["scores"] != ours


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: got 0"),
        (["--heads-at-once", "0"], "--heads-at-once: got 0"),
        (["--shards", "0"], "--shards: got 0"),
        (["--dataset", "tiny", "--dataset", "tiny"], "no name twice"),
        (["--dataset", "no-such-file.jsonl"], "no-such-file.jsonl"),
        (["--metric", "anls", "--metric", "anls"], "--metric: got 2 for 1 data sets"),
        (["--device", "abacus"], "abacus"),
    ],
)
def test_what_cannot_be_used_is_one_line(tiny_checkpoint, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["calibrate", str(tiny_checkpoint), *options]) == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_a_checkpoint_or_without_a_tokenizer_is_refused(tiny_checkpoint, tmp_path, capsys):
    assert main(["calibrate", str(tmp_path), "--work", str(tmp_path / "w")]) == 1
    told = capsys.readouterr().err
    assert "no config.json there" in told and "try: hawk-trt calibrate OWNER/NAME" in told
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "model")
    (copy / "tokenizer.json").unlink()
    assert main(["calibrate", str(copy), "--work", str(tmp_path / "w")]) == 1
    assert "no tokenizer.json there" in capsys.readouterr().err


def test_a_hub_id_is_taken_from_the_cache_and_names_the_model(planted, uninterrupted, tmp_path, monkeypatch, capsys):
    from huggingface_hub import constants

    checkpoint, dataset = planted
    commit = "0123456789abcdef0123456789abcdef01234567"
    kept = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(checkpoint, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for options in ([], ["--revision", commit]):
        assert main([*command("owner/name", dataset, tmp_path), *options]) == 0
        report, folder_report = (json.loads(p.read_text()) for p in (tmp_path / "weights.json", uninterrupted))
        assert report["model"] == {**folder_report["model"], "name": "owner/name"}
        assert report["values"] == folder_report["values"]
    capsys.readouterr()
    assert main(command("owner/other", dataset, tmp_path)) == 1
    assert "owner/other: no such folder, and the hub cannot be reached" in capsys.readouterr().err
    assert main([*command(checkpoint, dataset, tmp_path), "--revision", "main"]) == 1
    assert "--revision: only for a hub id (owner/name), got" in capsys.readouterr().err


@pytest.mark.slow
def test_a_ray_cluster_finds_the_same_weights(planted, uninterrupted, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install ray")
    argv = [*command(*planted, tmp_path), "--shards", "2"]
    done = subprocess.run([sys.executable, "-m", "hawk_trt", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "weights.json").read_bytes() == uninterrupted.read_bytes()


def test_of_a_hybrid_model_heads_of_full_attention_are_left_out(tmp_path):
    import torch

    from qwen import TOKENS, RandomQwen
    from random_models import prompt

    reference = RandomQwen("qwen3_5", tmp_path).reference
    embedded = reference.embed(prompt(1536, images=[(1, 4, 8)]), TOKENS)
    kept = reference.run(embedded, PruningConfig(keep_ratio=0.5)).kept_indices.tolist()
    with torch.inference_mode():
        whole = next(reference.decode(embedded, kept, 3))
        changes = []
        for scope in ("first-layer", "all-layers"):  # layer 3, and layers 3 and 7
            with without_heads(reference, scope, [BASELINE, 1, 2]):
                changes.append((next(reference.decode(embedded, kept, 3)) - whole).abs().amax(-1))
    first, both = changes
    assert first[0] == both[0] == 0
    assert (first[1:] > 1e-3).all() and (both[1:] > 1e-3).all() and (first[1:] != both[1:]).all()
