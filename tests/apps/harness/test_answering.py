"""Questions of a harness, answered with a pipeline: what each costs, and what is traced."""

import hashlib
import json

import pytest

from harness_questions import PRUNING, texts
from hawk_trt import Request
from hawk_trt.apps.harness import answering
from hawk_trt.apps.harness.answering import Answering, device_of_rank
from hawk_trt.errors import InvalidInput


def question_of(sample, max_new_tokens=8):
    content = [{"type": "image", "image": sample.image}, {"type": "text", "text": sample.question}]
    return lambda: Request([{"role": "user", "content": content}], max_new_tokens=max_new_tokens)


def no_question():
    raise InvalidInput("image: damaged")


def test_answers_are_the_pipelines_and_what_was_kept_is_counted(pipe, samples, expected):
    answering = Answering(pipe, PRUNING)
    questions = [question_of(sample) for sample in samples]
    assert texts(answering.answer(questions[:3], "a") + answering.answer(questions[3:], "a")) == expected
    assert answering.summary().startswith("hawk_trt: 4 answers, 52 of 256 visual tokens kept (20.3 %), ")


def test_a_bad_question_costs_its_own_answer_alone(pipe, samples, expected, tmp_path, capsys):
    answering = Answering(pipe, PRUNING, trace=tmp_path / "trace.jsonl")
    first, *others = (question_of(sample) for sample in samples)
    answers = answering.answer([first, no_question, *others], "task")
    assert isinstance(answers[1], InvalidInput)
    assert texts([answers[0], *answers[2:]]) == expected
    assert "task: a question has no answer: image: damaged" in capsys.readouterr().err
    assert "4 answers, 1 questions without an answer, " in answering.summary()
    lines = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert [line.get("answer") for line in lines] == [expected[0], None, *expected[1:]]
    assert lines[1]["error"] == "image: damaged"
    assert {(line["num_visual"], line["num_kept"]) for line in lines if "answer" in line} == {(64, 13)}
    questions = [line["question"] for line in lines]
    assert questions[0] == hashlib.sha256(samples[0].question.encode()).hexdigest()


def test_a_run_whose_questions_all_fail_ends(pipe, samples):
    answering = Answering(pipe, PRUNING)
    for _ in range(4):
        assert isinstance(answering.answer([no_question], "task")[0], InvalidInput)
    answering.answer([question_of(samples[0])], "task")
    with pytest.raises(InvalidInput, match="damaged"):
        answering.answer([no_question] * 5, "task")


def test_each_process_of_torchrun_takes_its_own_gpu_and_writes_its_own_trace(pipe, tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(answering, "holds_engines", lambda folder: folder == "engines")
    assert device_of_rank("cuda", "bundle") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("RANK", "6")
    assert device_of_rank("cuda", "bundle") == "cuda:2" == device_of_rank(None, "engines")
    assert (device_of_rank(None, "bundle"), device_of_rank("cuda:0", "bundle")) == (None, "cuda:0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert device_of_rank("cuda", "bundle") == "cuda:0", "the launcher has given the process its GPU"
    Answering(pipe, PRUNING, trace=tmp_path / "t.jsonl").answer([no_question], "task")
    assert [path.name for path in tmp_path.iterdir()] == ["t.rank6.jsonl"]
