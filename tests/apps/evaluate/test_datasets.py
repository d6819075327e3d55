"""Data sets and metrics: what is read, what is refused when it is loaded, and how an answer is scored."""

import json
import sys
from pathlib import Path

import easy_vqa
import numpy as np
import pytest
from PIL import Image

from examples.tiny_task import generate
from examples.tiny_task.__main__ import main as tiny_task
from hawk_trt.apps.evaluate.datasets import Sample, load_dataset
from hawk_trt.apps.evaluate.metrics import METRICS, metric_for
from hawk_trt.errors import InvalidInput


@pytest.mark.parametrize(
    ("metric", "answer", "right", "choices", "score"),
    [
        ("exact-match", "  Top  LEFT. ", ("top left",), (), 1.0),
        ("exact-match", "left", ("top left",), (), 0.0),
        ("vqa-accuracy", "The Dog!", ("dog",), (), 1.0),
        ("vqa-accuracy", "two", ("2", "2", "2", "2", "3"), (), 1.0),
        ("vqa-accuracy", "3", ("2", "2", "2", "2", "3"), (), 4 / 15),  # 0 without itself, 1/3 without another
        ("vqa-accuracy", "1,000.5", ("1000.5",), (), 1.0),
        ("anls", "hello", ("Hallo", "no"), (), 0.8),
        ("anls", "abcd", ("abxy",), (), 0.0),  # a half wrong is all wrong
        ("anls", "kitten", ("sitting",), (), 4 / 7),  # two replaced, one inserted
        ("anls", "", ("",), (), 1.0),
        ("relaxed-accuracy", "104", ("100",), (), 1.0),
        ("relaxed-accuracy", "106", ("100",), (), 0.0),
        ("relaxed-accuracy", "-95", ("-100",), (), 1.0),
        ("relaxed-accuracy", "51 %", ("0.5",), (), 1.0),
        ("relaxed-accuracy", "0.1", ("0",), (), 0.0),
        ("relaxed-accuracy", "Yes", ("yes",), (), 1.0),
        ("multiple-choice", "B", ("B",), ("cat", "dog"), 1.0),
        ("multiple-choice", "(b) a dog", ("B",), ("cat", "dog"), 1.0),
        ("multiple-choice", "The answer is B.", ("dog",), ("cat", "dog"), 1.0),
        ("multiple-choice", "dog", ("B",), ("cat", "dog"), 1.0),
        ("multiple-choice", "A", ("B",), ("cat", "dog"), 0.0),
        ("multiple-choice", "C", ("B",), ("cat", "dog"), 0.0),
        ("multiple-choice", "birds", ("B",), ("cat", "dog"), 0.0),
        ("multiple-choice", "", ("B",), ("cat", "dog"), 0.0),
        ("multiple-choice", "A dog.", ("B",), ("cat", "dog"), 1.0),  # the article is no letter
        ("multiple-choice", "A", ("A",), ("B", "A"), 1.0),  # the prompt asks for a letter
        ("by-sample", "(b)", ("B",), ("cat", "dog"), 1.0),
        ("by-sample", "(b)", ("B",), (), 0.0),
    ],
)
def test_metrics_score_as_their_papers_say(metric, answer, right, choices, score):
    assert METRICS[metric](answer, Sample("0", "?", right, choices=choices)) == pytest.approx(score)


def test_the_tiny_task_is_a_data_set_of_any_length():
    few, many = load_dataset("tiny", 3, 5), load_dataset("tiny", 6, 5)
    assert [sample.question for sample in few] == [sample.question for sample in many][:3]
    assert few.fingerprint == many.fingerprint != load_dataset("tiny", 3, 6).fingerprint
    made = list(generate(5, 3))
    for sample, expected in zip(few, made, strict=True):
        assert (sample.question, sample.answers) == (expected.question, (expected.answer,))
        assert np.array_equal(sample.images[0], expected.image)


def test_easy_vqas_questions_are_a_data_set_of_other_pictures():
    few, many = load_dataset("easy-vqa", 20, 1), load_dataset("easy-vqa", None, 1)
    assert (few.count, many.count) == (20, 9673)
    assert few.fingerprint == many.fingerprint != load_dataset("easy-vqa", 20, 2).fingerprint
    samples = list(few)
    assert samples == list(many)[:20]
    answers = set((Path(easy_vqa.__file__).parent / "data" / "answers.txt").read_text().split())
    assert {sample.answers[0] for sample in samples} <= answers
    with Image.open(samples[0].images[0]) as picture:
        assert picture.size == (64, 64)


def test_without_its_package_easy_vqa_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InvalidInput, match="pip install easy-vqa"):
        load_dataset("easy-vqa", 1, 0)


def test_a_folder_of_the_tiny_task_is_a_data_set(tmp_path):
    assert tiny_task(["--out", str(tmp_path), "--count", "6", "--seed", "2"]) == 0
    dataset = load_dataset(str(tmp_path), None, 0)
    by_question = {sample.question: sample for sample in dataset}
    for made in generate(2, 6):
        sample = by_question[made.question]
        assert sample.answers == (made.answer,)
        with Image.open(sample.images[0]) as image:
            assert np.array_equal(np.asarray(image), made.image)


def test_a_jsonl_file_is_read_in_an_order_of_the_seed(tmp_path):
    path = tmp_path / "some.jsonl"
    entries = [{"image": f"{i}.png", "question": f"q{i}", "answer": i} for i in range(20)]
    entries[3] = {"id": "x", "images": ["a.png", "b.png"], "video": "c.mp4", "question": "q3", "answers": ["1", 2.5]}
    entries[4] = {"question": "Which?", "choices": ["left", "right"], "answer": "B"}
    path.write_text("\n\n".join(map(json.dumps, entries)))
    for name in ("a", "b", *range(20)):
        Image.new("RGB", (28, 28)).save(tmp_path / f"{name}.png")
    (tmp_path / "c.mp4").touch()
    every = list(load_dataset(str(path), None, 1))
    assert [sample.question for sample in load_dataset(str(path), 5, 1)] == [s.question for s in every][:5]
    assert [s.id for s in every] != [s.id for s in load_dataset(str(path), None, 2)]
    by_id = {sample.id: sample for sample in every}
    assert by_id["x"].images == (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    assert (by_id["x"].videos, by_id["x"].answers) == ((str(tmp_path / "c.mp4"),), ("1", "2.5"))
    assert by_id["4"].prompt == "Which?\nA. left\nB. right\nAnswer with the letter of the right choice."
    assert len(by_id) == 20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no sample"),
        ('{"question": "?"}', "sample 0 has no answer"),
        ('{"answer": "?"}', "sample 0: .*question"),
        ('{"question": "?", "answer": "a"}\n\n{"question": 3, "answer": "a"}', "sample 1: Expected `str`"),
        ('{"question": "?", "answer": "a"}\n\n[1]', "line 3"),
        ('{"question": "?", "choices": ["a", "b"], "anwser": "a"}', "no answer; unknown keys: anwser"),
        ('{"question": "?", "choices": ["a", "b"], "options": ["a"], "answer": "a"}', "both choices and options"),
        ('{"question": "?", "answer": "a", "image": "none.png"}', "sample 0: .*none.png: no such file"),
        ('{"id": "x", "question": "?", "answer": "a", "videos": ["no.mp4"]}', "sample x: .*no.mp4: no such file"),
        ('{"question": "?", "answer": " ", "answers": [""]}', "sample 0 has no answer"),
        ('{"question": "", "answer": "a"}', "sample 0 has no question"),
        ('{"question": "?", "A": "a ring", "B": "a heart", "answer": "B"}', "has its choices as A, B"),
        ("[1", 'expected {"image"'),
        ('{"id": 1, "question": "?", "answer": "a"}\n' * 2, "each id once"),
    ],
)
def test_files_that_are_no_data_set_are_refused(tmp_path, content, message):
    (tmp_path / "samples.jsonl").write_text(content)
    with pytest.raises(InvalidInput, match=message):
        load_dataset(str(tmp_path), None, 0)


def test_a_byte_order_mark_and_keys_that_are_null_say_nothing(tmp_path):
    file = tmp_path / "samples.jsonl"
    file.write_text(
        '{"question": "?", "answer": "a", "answers": null, "choices": null, "images": null}\n', encoding="utf-8-sig"
    )
    (sample,) = load_dataset(str(file), None, 0)
    assert (sample.answers, sample.choices, sample.images) == (("a",), (), ())


def test_a_table_is_no_damaged_jsonl(tmp_path):
    table = tmp_path / "MMBench.tsv"
    table.write_text("index\tquestion\tA\tB\tanswer\n")
    with pytest.raises(InvalidInput, match=r"MMBench.tsv', expected tiny, easy-vqa, a JSONL file"):
        load_dataset(str(table), None, 0)


CHOICES = ["a ring", "a heart", "3"]


@pytest.mark.parametrize("name", ["choices", "options"])
@pytest.mark.parametrize(
    ("key", "choices", "letter"),
    [
        (1, CHOICES, "B"),
        ("b", CHOICES, "B"),
        ("(B)", CHOICES, "B"),
        ("B.", CHOICES, "B"),
        ("A Heart", CHOICES, "B"),
        ("B. a heart", CHOICES, "B"),
        (3, CHOICES, "C"),  # the text of one, and no index
        ("3", CHOICES, "C"),
        ("A", ["A", "B"], "A"),
    ],
)
def test_the_key_of_a_choice_is_its_index_letter_or_text(tmp_path, name, key, choices, letter):
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"question": "?", name: choices, "answer": key}))
    dataset = load_dataset(str(path), None, 0)
    (sample,) = dataset
    assert metric_for(None, dataset) == "multiple-choice"
    for place, choice in enumerate(choices):
        right = float("ABC"[place] == letter)
        for metric in ("multiple-choice", "by-sample", "exact-match"):
            assert METRICS[metric]("ABC"[place], sample) == METRICS[metric](choice, sample) == right


@pytest.mark.parametrize(
    ("key", "choices", "reason"),
    [
        (3, ["a", "b", "c"], "matches none"),  # an index that counts from 1
        (-1, ["a", "b", "c"], "matches none"),
        (1.0, ["a", "b", "c"], "matches none"),
        ("1", ["cat", "dog"], "matches none"),  # text may count from 0 or from 1
        ("C", ["cat", "dog"], "matches none"),
        ("a bird", ["cat", "dog"], "matches none"),
        ("B. cat", ["cat", "dog"], "matches none"),
        ("", ["cat", "dog"], "matches none"),
        ("same", ["same", "same"], "A. same and B. same"),
        (1, ["1", "2"], "A. 1 and B. 2"),
        ("A", ["B", "A"], "A. B and B. A"),
    ],
)
def test_a_key_that_means_no_choice_or_several_is_refused_by_the_samples_number(tmp_path, key, choices, reason):
    good = {"question": "?", "choices": ["x", "y"], "answer": "A"}
    (tmp_path / "samples.json").write_text(
        json.dumps([good, good, {"question": "?", "choices": choices, "answer": key}])
    )
    with pytest.raises(InvalidInput, match=f"sample 2: the answer .* (could mean|{reason})") as caught:
        load_dataset(str(tmp_path), 1, 0)
    assert reason in str(caught.value)


def test_a_metric_that_fits_no_sample_is_refused_and_the_default_fits_all(tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"question": "?", "choices": ["a", "b"], "answer": 1}\n{"question": "?", "answer": 1}')
    dataset = load_dataset(str(path), None, 0)
    assert metric_for(None, dataset) == "by-sample"
    assert metric_for("anls", dataset) == "anls"
    for metric in ("multiple-choice", "vqa-accuracy"):
        with pytest.raises(InvalidInput, match=f"--metric {metric}: sample"):
            metric_for(metric, dataset)
    assert metric_for(None, load_dataset("tiny", 2, 0)) == "exact-match"


def test_a_data_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="expected tiny, easy-vqa, a JSONL file or a folder"):
        load_dataset(str(tmp_path / "none.jsonl"), None, 0)
    with pytest.raises(InvalidInput, match="this folder holds no samples"):
        load_dataset(str(tmp_path), None, 0)
