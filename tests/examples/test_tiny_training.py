"""The training of the tiny model: its forward pass, its lessons, and that the same seed gives the same weights."""

import hashlib
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from export.__main__ import main as export
from hawk_trt import Pipeline, PruningConfig
from hawk_trt.errors import InvalidInput

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from examples.tiny_task import QUESTION_KINDS, generate  # noqa: E402 - what follows needs torch
from examples.tiny_task.scene import draw_scene  # noqa: E402
from examples.tiny_training import accuracy, evidence  # noqa: E402
from examples.tiny_training.checkpoint import WEIGHTS, write_checkpoint  # noqa: E402
from examples.tiny_training.hybrid import HybridNetwork  # noqa: E402
from examples.tiny_training.lessons import NO_LABEL, Teacher, hide  # noqa: E402
from examples.tiny_training.network import Network  # noqa: E402
from examples.tiny_training.recipe import STAGES, Pictures, Stage  # noqa: E402
from examples.tiny_training.trainer import Trainer  # noqa: E402

HYBRID = Path(__file__).parents[2] / "examples" / "tiny-hybrid"
FEW = (Pictures(112, 2, (2, 3)), Pictures(224, 1, (3, 4)))
SHORT = (
    Stage("tokens", "vision", 2, FEW, 0.5, 0.0, 1e-3, 0.5),
    Stage("questions", "language", 2, FEW, 0.5, 0.5, 1e-3, 0.0),
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher(tiny_checkpoint):
    return Teacher(tiny_checkpoint)


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()


@pytest.mark.parametrize("size", [112, 224, 336])
@torch.no_grad()
def test_the_training_computes_what_transformers_does_for_each_question_alone(teacher, model, size):
    patches, packed = teacher.questions(np.random.default_rng(size), Pictures(size, 2, (4, 9)), 0.5)
    network = Network(model, torch.float32)
    visual = network.visual_tokens(patches)
    logits, wanted = network.answer_logits(visual, packed)
    rows = torch.zeros(*wanted.shape, logits.shape[-1])
    rows[wanted] = logits
    image = model.config.image_token_id
    for picture, question in ((0, 0), (1, 7)):
        segment, labels = packed.input_ids[picture, question], packed.labels[picture, question]
        ids = torch.cat([packed.before, torch.full((visual.shape[1],), image), segment])[None]
        count = len(patches.pixel_values) // 2
        expected = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == image).int(),
            pixel_values=patches.pixel_values[picture * count : (picture + 1) * count],
            image_grid_thw=patches.grid_thw[picture : picture + 1],
        ).logits[0, -len(segment) :]
        asked = labels != NO_LABEL
        assert asked.sum() >= 2  # a word and the end
        torch.testing.assert_close(rows[picture, question][asked], expected[asked], rtol=0, atol=2e-4)


@torch.no_grad()
def test_what_is_hidden_is_as_if_it_were_pruned(teacher, model):
    patches, packed = teacher.questions(np.random.default_rng(3), Pictures(224, 3, (6, 12)), 0.0, hiding=1.0)
    assert 0 < packed.seen.sum() < packed.seen.numel()
    network = Network(model, torch.float32)
    visual = network.visual_tokens(patches)
    logits, wanted = network.answer_logits(visual, packed)
    rows = torch.zeros(*wanted.shape, logits.shape[-1])
    rows[wanted] = logits
    image = model.config.image_token_id
    for picture in range(3):
        segment, asked = packed.input_ids[picture, 0], wanted[picture, 0]
        ids = torch.cat([packed.before, torch.full((64,), image), segment])[None]
        positions, _ = model.model.get_rope_index(
            ids, mm_token_type_ids=(ids == image).int(), image_grid_thw=patches.grid_thw[picture : picture + 1]
        )
        embeds = model.get_input_embeddings()(ids)
        embeds[ids == image] = visual[picture]
        kept = torch.ones_like(ids[0], dtype=torch.bool)
        kept[ids[0] == image] = packed.seen[picture]
        expected = model(inputs_embeds=embeds[:, kept], position_ids=positions[:, :, kept]).logits[0, -len(segment) :]
        torch.testing.assert_close(rows[picture, 0][asked], expected[asked], rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def hybrid():
    """A hybrid of random weights, larger than those that a training begins with."""
    torch.manual_seed(0)
    config = transformers.Qwen3_5Config.from_pretrained(HYBRID, dtype="float32")
    made = transformers.Qwen3_5ForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.endswith("A_log"):
            parameter.uniform_(-4, 0)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return made


@pytest.mark.parametrize(("size", "hiding"), [(112, 0.0), (224, 1.0)])
@torch.no_grad()
def test_the_hybrid_computes_what_transformers_does_with_tokens_dropped_before_softmax_attention(
    teacher, hybrid, size, hiding
):
    patches, packed = teacher.questions(np.random.default_rng(size), Pictures(size, 2, (4, 9)), 0.5, hiding)
    network = HybridNetwork(hybrid, torch.float32)
    visual = network.visual_tokens(patches)
    logits, wanted = network.answer_logits(visual, packed)
    rows = torch.zeros(*wanted.shape, logits.shape[-1])
    rows[wanted] = logits
    image, language = hybrid.config.image_token_id, hybrid.model.language_model
    seen_by_tower = hybrid.model.visual(patches.pixel_values, patches.grid_thw).pooler_output.view_as(visual)
    torch.testing.assert_close(visual, seen_by_tower, rtol=0, atol=2e-4)
    for picture, question in ((0, 0), (1, 7)):
        segment, asked = packed.input_ids[picture, question], wanted[picture, question]
        ids = torch.cat([packed.before, torch.full((visual.shape[1],), image), segment])[None]
        positions, _ = hybrid.model.get_rope_index(
            ids, mm_token_type_ids=(ids == image).int(), image_grid_thw=patches.grid_thw[picture : picture + 1]
        )
        x = hybrid.get_input_embeddings()(ids)
        x[ids == image] = visual[picture]
        kept = torch.ones_like(ids[0], dtype=torch.bool)
        kept[ids[0] == image] = packed.seen[picture]
        turns = language.rotary_emb(x, positions)
        for number, layer in enumerate(language.layers):
            if number == network.first_full:
                x, turns = x[:, kept], tuple(part[:, kept] for part in turns)
                mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)[None, None]
            x = layer(x, turns, attention_mask=mask if layer.block_type == "full_attention" else None)
        expected = hybrid.lm_head(language.norm(x))[0, -len(segment) :]
        torch.testing.assert_close(rows[picture, question][asked], expected[asked], rtol=0, atol=2e-4)


@torch.no_grad()
def test_tokens_that_are_dropped_before_layer_0_of_a_hybrid_are_as_if_they_were_not_there(teacher, hybrid):
    patches, packed = teacher.questions(np.random.default_rng(2), Pictures(112, 1, (3, 4)), 0.0, hiding=1.0)
    network = HybridNetwork(hybrid, torch.float32)
    visual = network.visual_tokens(patches)
    at_softmax, at_0 = (network.answer_logits(visual, packed, first)[0] for first in (None, 0))
    other = torch.where(packed.seen[..., None], visual, torch.randn_like(visual))
    torch.testing.assert_close(network.answer_logits(other, packed, 0)[0], at_0, rtol=0, atol=1e-5)
    assert (network.answer_logits(other, packed)[0] - at_softmax).abs().max() > 1e-2


@torch.no_grad()
def test_the_hybrids_scores_are_those_of_its_first_softmax_attention_without_rope(teacher, hybrid):
    samples = list(generate(4, 2, size=112, objects=(2, 4)))
    patches, packed = teacher.alone(samples)
    network = HybridNetwork(hybrid, torch.float32)
    visual = network.visual_tokens(patches)
    layer = hybrid.model.language_model.layers[3]
    attention, taken = layer.self_attn, []
    hook = layer.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    for picture, sample in enumerate(samples):
        segment = packed.input_ids[picture, 0]
        ids = torch.cat([packed.before, torch.full((16,), hybrid.config.image_token_id), segment])[None]
        x = hybrid.get_input_embeddings()(ids)
        x[0, len(packed.before) : len(packed.before) + 16] = visual[picture]
        hybrid.model.language_model(inputs_embeds=x)
        h = layer.input_layernorm(taken[-1][0])
        put = teacher.alone([sample])[1].input_ids[0, 0].tolist()
        behind = len(packed.before) + 16
        asking = range(behind + 1, behind + put.index(hybrid.config.text_config.eos_token_id))
        by_head = []
        for head in range(8):
            query = attention.q_norm(attention.q_proj(h)[:, head * 64 : head * 64 + 32])
            key = attention.k_norm(attention.k_proj(h)[:, head // 4 * 32 : head // 4 * 32 + 32])
            by_head.append((query[list(asking)] @ key[len(packed.before) : behind].T).mean(0))
        expected = sum(scores / scores.norm() for scores in by_head) / 8
        torch.testing.assert_close(network.token_scores(visual, packed)[picture], expected, rtol=0, atol=1e-5)
    hook.remove()


def test_the_evidence_says_what_was_kept_and_what_was_right(teacher, hybrid, model):
    samples = list(generate(1, 10, size=112, objects=(2, 4)))
    softmax = evidence.answers(Network(model, torch.float32), teacher, samples, 1)
    assert softmax["nothing dropped"].right.sum() >= 9
    assert softmax["nothing dropped"].kept.all()
    assert not softmax["nothing dropped"].dropped.any()
    nothing, chance = softmax["no visual token"], softmax["random, 20 %"]
    there = np.array([bool(sample.targets) for sample in samples])
    assert (nothing.dropped == there).all()
    assert (nothing.kept == ~there).all()
    assert not (chance.kept & chance.dropped).any()
    found = evidence.answers(HybridNetwork(hybrid, torch.float32), teacher, samples, 1)
    assert set(softmax) < set(found)
    assert (found["random, 20 %"].kept == chance.kept).all()
    own, other = found["HAWK, 20 %"], found["HAWK by another question, 20 %"]
    assert (own.kept != other.kept).any() or (own.dropped != other.dropped).any()
    assert evidence.table(samples, softmax).count("\n") == 1 + len(softmax)


def test_questions_are_about_what_is_seen():
    rng = np.random.default_rng(0)
    scene = draw_scene(rng, 224, 12, aligned=True)
    for _ in range(20):
        left, seen = hide(rng, scene)
        assert set(left.things) <= set(scene.things)
        cells = {thing: int(y) // 28 * 8 + int(x) // 28 for thing in scene.things for x, y in [thing.box.centre]}
        assert {thing for thing, cell in cells.items() if seen[cell]} == set(left.things) != set()


def test_a_question_is_put_as_the_pipeline_puts_it(teacher, tiny_bundle):
    _, packed = teacher.questions(np.random.default_rng(0), Pictures(112, 1, (4, 6)), 0.0)
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        tokenizer, image = pipe.processor.chat.tokenizer, pipe.bundle.manifest.special_tokens.image
        assert tokenizer is not None
        for ids, labels in zip(packed.input_ids[0], packed.labels[0], strict=True):
            first = int((labels != NO_LABEL).nonzero()[0])
            put = ids[: first + 1].tolist()
            question = (
                tokenizer.decode(put).partition("\n")[0].removeprefix("<|vision_end|>").partition("<|im_end|>")[0]
            )
            prompt = pipe.prepare(question, images=[np.zeros((112, 112, 3), np.uint8)])
            assert prompt.input_ids.reshape(-1).tolist() == [*packed.before.tolist(), *[image] * 16, *put]


def test_kinds_are_asked_alike_and_counts_are_not_mostly_one(teacher):
    kinds, counts = Counter(), Counter()
    for seed in range(4):
        _, packed = teacher.questions(np.random.default_rng(seed), Pictures(224, 16, (8, 18)), 0.3)
        kinds.update(packed.kinds.flatten().tolist())
        counting = packed.kinds == QUESTION_KINDS.index("count")
        counts.update(labels[labels != NO_LABEL][0].item() for labels in packed.labels[counting])
    assert min(kinds.values()) > 0.8 * max(kinds.values())
    assert max(counts.values()) < 0.5 * sum(counts.values())
    assert sum(share > 0.05 * sum(counts.values()) for share in counts.values()) >= 5


def test_labels_say_what_the_cells_show(teacher):
    rng = np.random.default_rng(1)
    patches, labels = teacher.cells(rng, Pictures(112, 8, (5, 5)), 0.0)
    assert (patches.pixel_values.shape, patches.grid_thw.shape) == ((8 * 64, 1176), (8, 3))
    assert torch.equal(labels.glyph > 0, labels.colour > 0)
    assert (labels.glyph > 0).sum(dim=1).tolist() == [5] * 8
    assert labels.quarter[0].tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2


def trained(checkpoint, work, seed=0, stages=SHORT, say=lambda _: None):
    trainer = Trainer(checkpoint, work, seed, stages, say)
    trainer.run()
    return trainer.model.state_dict()


@pytest.fixture(scope="module")
def weights(tiny_checkpoint, tmp_path_factory):
    return trained(tiny_checkpoint, tmp_path_factory.mktemp("training"))


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_same_seed_gives_the_same_weights_and_another_others(tiny_checkpoint, weights, tmp_path):
    assert same(weights, trained(tiny_checkpoint, tmp_path / "again"))
    assert not same(weights, trained(tiny_checkpoint, tmp_path / "other", seed=1))


def test_both_stages_change_what_they_train_and_nothing_else(tiny_checkpoint, weights, tmp_path):
    tower_only = trained(tiny_checkpoint, tmp_path, stages=SHORT[:1])
    changed = {name for name, tensor in weights.items() if not torch.equal(tensor, tower_only[name])}
    assert changed == {name for name in weights if not name.startswith("model.visual.")}
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig.from_pretrained(tiny_checkpoint, dtype="float32")
    untrained = transformers.Qwen2_5_VLForConditionalGeneration(config).state_dict()
    changed = {name for name, tensor in untrained.items() if not torch.equal(tensor, tower_only[name])}
    assert changed == {name for name in weights if name.startswith("model.visual.")}


def test_a_killed_run_ends_with_the_same_weights(tiny_checkpoint, weights, tmp_path):
    def stop_after_the_first_stage(line):
        if "held out" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tiny_checkpoint, tmp_path, say=stop_after_the_first_stage)
    lines = []
    assert same(weights, trained(tiny_checkpoint, tmp_path, say=lines.append))
    assert "going on after step 2 of tokens" in lines[0]
    assert not any(line.startswith("tokens") for line in lines)
    with pytest.raises(InvalidInput, match=r"got a run of seed 0.*expected seed 1.*Choose another --work"):
        Trainer(tiny_checkpoint, tmp_path, 1, SHORT, lines.append)


def test_what_is_written_is_a_checkpoint_like_the_shipped_one(tiny_checkpoint, weights, tmp_path):
    write_checkpoint(weights, tiny_checkpoint, tmp_path / "new")
    shipped, new = (load_file(folder / WEIGHTS) for folder in (tiny_checkpoint, tmp_path / "new"))
    assert {name: (t.shape, t.dtype) for name, t in new.items()} == {n: (t.shape, t.dtype) for n, t in shipped.items()}
    assert export([str(tmp_path / "new"), "--out", str(tmp_path / "bundle"), "--target", "portable"]) == 0


def test_the_table_of_right_answers_has_a_line_for_each_kind_of_picture(tiny_bundle, tmp_path, capsys):
    assert accuracy.main([str(tiny_bundle), "--count", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("|") for line in lines] == [4 + len(accuracy.WAYS)] * (2 + len(accuracy.SETTINGS))
    assert "| 224 px, aligned, 10 to 16 glyphs | tiny-vlm | 100.0 % [20.7, 100.0] |" in lines[2]
    assert accuracy.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("name", ["tiny-vlm", "tiny-hybrid"])
def test_the_shipped_weights_are_those_that_their_readme_names(name):
    folder = HYBRID.parent / name
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert re.findall(r"\b[0-9a-f]{64}\b", (folder / "README.md").read_text(encoding="utf-8")) == [digest]


def test_the_shipped_hybrid_answers_in_the_pipeline_as_in_training(tmp_path):
    assert export([str(HYBRID), "--out", str(tmp_path), "--target", "cpu"]) == 0
    samples = list(generate(1, 5, size=112, objects=(2, 4)))
    found = evidence.answers(evidence.load_network(HYBRID), Teacher(HYBRID), samples, 1)
    with Pipeline.load(tmp_path, threads=1) as pipe:
        for way, ratio in (("nothing dropped", 1.0), ("HAWK, 20 %", 0.2), ("HAWK, 10 %", 0.1)):
            pruning = PruningConfig(keep_ratio=ratio)
            assert accuracy.right(pipe, samples, pruning) == found[way].right.tolist()
    assert found["nothing dropped"].right.sum() >= 4


def test_the_recipe_has_pictures_that_the_windows_divide():
    for stage in STAGES:
        assert stage.steps > 0
        assert all(pictures.size % 112 == 0 for pictures in stage.cycle)
