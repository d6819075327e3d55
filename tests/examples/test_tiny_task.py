"""The tiny model's task: the same for the same seed, true to its pictures, and answered by the model."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from PIL import Image

from examples.tiny_task import QUESTION_KINDS, generate
from examples.tiny_task.__main__ import main
from examples.tiny_task.glyphs import COLOURS
from examples.tiny_task.questions import ask
from examples.tiny_task.scene import CELL, draw_scene, max_things
from hawk_trt.errors import InvalidInput

SAMPLES = ["--count", "3", "--seed", "84", "--kinds", "colour", "where", "count"]  # of examples/tiny-vlm/samples


def same(left, right):
    return np.array_equal(left.image, right.image) and (left.question, left.answer, left.targets) == (
        right.question,
        right.answer,
        right.targets,
    )


def test_a_seed_makes_the_same_samples_whatever_their_number():
    few, many = list(generate(5, 3)), list(generate(5, 6))
    assert all(same(left, right) for left, right in zip(few, many, strict=False))
    assert not any(same(left, right) for left, right in zip(few, generate(6, 3), strict=True))


def test_kinds_come_in_equal_number():
    assert set(Counter(sample.kind for sample in generate(0, 20)).values()) == {4}


@pytest.mark.parametrize("size", [112, 224, 336])
def test_aligned_things_lie_inside_one_visual_token(size):
    scene = draw_scene(np.random.default_rng(0), size, 12, aligned=True)
    assert scene.image.shape == (size, size, 3)
    assert scene.image.dtype == np.uint8
    cells = {(thing.box.x // CELL, thing.box.y // CELL) for thing in scene.things}
    assert len(cells) == 12
    for thing in scene.things:
        assert thing.box.x % CELL + thing.box.width <= CELL
        assert thing.box.y % CELL + thing.box.height <= CELL


def test_things_straddle_cells_where_scenes_are_not_aligned():
    scene = draw_scene(np.random.default_rng(0), 224, 16, aligned=False)
    assert any(thing.box.x % CELL + thing.box.width > CELL for thing in scene.things)
    assert all(0 <= thing.box.x <= 224 - thing.box.width for thing in scene.things)


def test_colour_answers_are_the_colour_in_the_picture():
    for sample in generate(1, 20, kinds=("colour",)):
        (box,) = sample.targets
        pixels = sample.image[box.y : box.y + box.height, box.x : box.x + box.width].reshape(-1, 3).astype(float)
        distance = {name: np.linalg.norm(pixels - rgb, axis=1) for name, rgb in COLOURS.items()}
        painted = {name: int((far < 40).sum()) for name, far in distance.items()}
        assert max(painted, key=painted.__getitem__) == sample.answer


def test_where_and_count_answers_follow_from_the_targets():
    for sample in generate(2, 40, kinds=("where", "count", "exist")):
        if sample.kind == "count":
            assert sample.answer == str(len(sample.targets))
        elif sample.kind == "exist":
            assert sample.answer == ("yes" if sample.targets else "no")
        else:
            x, y = sample.targets[0].centre
            assert sample.answer == f"{'top' if y < 112 else 'bottom'} {'left' if x < 112 else 'right'}"


def test_a_question_names_one_thing_only():
    for seed in range(30):
        scene = draw_scene(np.random.default_rng(seed), 224, 16, aligned=True)
        glyphs = Counter(thing.glyph for thing in scene.things)
        for kind in ("colour", "where"):
            question = ask(np.random.default_rng(seed), scene, kind)
            if question is not None:
                (thing,) = (thing for thing in scene.things if thing.box == question.targets[0])
                assert glyphs[thing.glyph] == 1


def test_the_fullest_scenes_still_have_every_question():
    for size in (56, 84, 112, 448):
        assert len(list(generate(0, 5, size=size, objects=(max_things(size), max_things(size))))) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed, count: got -1, 1"),
        ({"count": -2}, "seed, count: got 0, -2"),
        ({"size": 100}, "size: got 100, expected a multiple of 28"),
        ({"size": 0}, "size: got 0"),
        ({"objects": (0, 3)}, "objects: got 0 to 3"),
        ({"objects": (5, 4)}, "objects: got 5 to 4"),
        ({"objects": (1, 65)}, "objects: got 1 to 65, expected 1 to"),
        ({"kinds": ()}, "kinds: got ''"),
        ({"kinds": ("weight",)}, f"expected some of {', '.join(QUESTION_KINDS)}"),
    ],
)
def test_settings_that_no_scene_can_have_are_refused(settings, message):
    with pytest.raises(InvalidInput, match=message):
        generate(**{"seed": 0, "count": 1, **settings})


def test_the_shipped_samples_come_from_the_command_in_the_model_card(tiny_checkpoint, tmp_path, capsys):
    assert f"python -m examples.tiny_task --out examples/tiny-vlm/samples {' '.join(SAMPLES)}" in (
        tiny_checkpoint / "README.md"
    ).read_text(encoding="utf-8")
    assert main(["--out", str(tmp_path), *SAMPLES]) == 0
    assert capsys.readouterr().out == f"3 samples written to {tmp_path}\n"
    shipped = tiny_checkpoint / "samples"
    assert json.loads((tmp_path / "samples.json").read_text()) == json.loads((shipped / "samples.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in shipped.iterdir()}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as made, Image.open(shipped / path.name) as kept:
            assert np.array_equal(np.asarray(made), np.asarray(kept))


def test_the_command_line_refuses_and_fails_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--out", str(tmp_path), "--size", "99"])
    assert "size: got 99" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["--out", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


# Measured: 198 of the first 200 with seed 0, and 98.1 % of 1,000 with seed 1 (91 % of the counts, nearly all else).
@pytest.mark.parametrize(
    ("seed", "count", "at_least"),
    [(0, 40, 0.97), pytest.param(1, 1000, 0.97, marks=pytest.mark.slow)],
)
def test_the_model_answers_fresh_questions_without_pruning(tiny_checkpoint, seed, count, at_least):
    answer = pytorch_answerer(tiny_checkpoint)
    right = sum(answer(sample.image, sample.question) == sample.answer for sample in generate(seed, count))
    assert right >= at_least * count


def test_the_model_answers_the_shipped_samples(tiny_checkpoint):
    answer = pytorch_answerer(tiny_checkpoint)
    for sample in json.loads((tiny_checkpoint / "samples" / "samples.json").read_text()):
        with Image.open(tiny_checkpoint / "samples" / sample["image"]) as image:
            assert answer(np.asarray(image), sample["question"]) == sample["answer"]


def pytorch_answerer(checkpoint):
    """The model's own answer, in float32 with transformers."""
    import torch
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    placeholder = "<|image_pad|>"

    def answer(image, question):
        vision = processor(images=[image], return_tensors="pt")
        content = [{"type": "image"}, {"type": "text", "text": question}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        num_visual = int(vision["image_grid_thw"].prod()) // 4
        input_ids = tokenizer(prompt.replace(placeholder, placeholder * num_visual), return_tensors="pt").input_ids
        is_image = input_ids == tokenizer.convert_tokens_to_ids(placeholder)
        output = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            mm_token_type_ids=is_image.int(),  # without it Qwen2.5-VL would use 1-D positions
            max_new_tokens=8,
            **vision,
        )
        return tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)

    return answer


def test_generation_is_lazy():
    assert len(list(islice(generate(0, 10**9), 2))) == 2
