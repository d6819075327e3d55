"""The adapter of lmms-eval: against the package where it is installed, else against its base."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

import harness_standin
from examples.tiny_task import generate
from harness_questions import WHOLE, texts, turn
from hawk_trt import PruningConfig, SamplingConfig
from hawk_trt.errors import HawkError, InvalidInput


@pytest.fixture
def adapter(monkeypatch):
    """The lmms-eval adapter's module."""
    harness_standin.lmms_eval(monkeypatch)
    monkeypatch.delitem(sys.modules, "hawk_trt.apps.harness.lmms_eval", raising=False)
    return importlib.import_module("hawk_trt.apps.harness.lmms_eval")


def ask(model, documents, messages, settings):
    """Requests as lmms-eval makes them: (context, doc_to_messages, generation_kwargs, doc_id, task, split)."""
    model.task_dict["task"] = {"test": documents}
    each = settings if isinstance(settings, list) else [settings] * len(documents)
    return [
        SimpleNamespace(args=("context", messages, kwargs, number, "task", "test"))
        for number, kwargs in enumerate(each)
    ]


@pytest.mark.parametrize("batch_size", ["1", "3", "auto"])
def test_lmms_eval_gets_an_answer_to_each_request_in_its_order(
    adapter, tiny_bundle, samples, expected, capsys, batch_size
):
    arguments = f"bundle={tiny_bundle},keep_ratio=0.2"
    model = adapter.HawkTrt.create_from_arg_string(arguments, {"batch_size": batch_size, "device": None})
    settings = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": None}
    requests = ask(model, samples, turn, [settings, settings, settings | {"until": ["\n\n"]}, settings])
    answers = model.generate_until(requests)
    assert texts(answers) == expected
    assert "4 answers, 52 of 256 visual tokens kept" in capsys.readouterr().err
    counts = answers[0].token_counts.to_dict()
    assert (counts["visual_tokens"], counts["kept_visual_tokens"]) == (64, 13)
    assert counts["output_tokens"] == 2 and counts["input_tokens"] > 64
    assert not adapter.HawkTrt.is_simple


def test_lmms_evals_settings_reach_the_answer(adapter, tiny_bundle, pipe, samples):
    model = adapter.HawkTrt(str(tiny_bundle), keep_ratio=1.0, system_prompt="Answer.", min_pixels=40000)
    settings = {"max_new_tokens": 3, "temperature": 0.9, "top_p": 0.9, "until": "zzz", "do_sample": True}
    said = model.generate_until(ask(model, samples[:1], turn, settings))
    messages = [
        {"role": "system", "content": "Answer."},
        {
            "role": "user",
            "content": [{"type": "image", "image": samples[0].image}, {"type": "text", "text": samples[0].question}],
        },
    ]
    whole = pipe.generate(
        messages,
        pruning=PruningConfig(keep_ratio=1.0),
        max_new_tokens=3,
        sampling=SamplingConfig(0.9, 0.9, seed=0),
        min_pixels=40000,
    )
    assert texts(said) == [whole.text]


def test_lmms_evals_own_default_ends_no_answer_and_a_tasks_stop_strings_do(adapter):
    until = adapter._stop
    assert until({"until": ["\n\n"]}) == until({"until": None}) == until({}) == []
    assert until({"until": "A"}) == ["A"]
    assert until({"until": ["\n\n", "Question:"]}) == ["\n\n", "Question:"]


def test_repeats_of_a_request_draw_anew(adapter, tiny_bundle, samples):
    model = adapter.HawkTrt(str(tiny_bundle), keep_ratio=1.0, batch_size=2)
    settings = {"max_new_tokens": 4, "temperature": 40.0, "do_sample": True}
    (request,) = ask(model, samples[:1], turn, settings)
    said = texts(model.generate_until([request] * 4))
    assert len(set(said)) > 1, "lmms-eval's --repeats hands over the same request"
    assert said == texts(model.generate_until([request] * 4)), "the seeds are those of the repeats"


def test_what_lmms_eval_asks_of_videos_reaches_them(adapter):
    content = [{"type": "video", "url": "a.mp4", "start_time": 3.0, "end_time": None}]
    (item,) = adapter._items(content, {"fps": None, "nframes": 8, "max_frames": None})
    assert {key: value for key, value in item.items() if value is not None} == {
        "type": "video", "video": "a.mp4", "video_start": 3.0, "nframes": 8,
    }  # fmt: skip


def test_what_lmms_eval_asks_and_cannot_be_done_is_an_error(adapter, tiny_bundle, samples, capsys):
    model = adapter.HawkTrt(str(tiny_bundle))
    requests = ask(model, samples[:1], turn, {"num_beams": 4})
    with pytest.raises(InvalidInput, match="num_beams: got 4"):
        model.generate_until(requests)
    audio = {"type": "audio", "url": "a.wav"}
    assert texts(model.generate_until(ask(model, samples[:1], lambda s: turn(s, items=[audio]), {}))) == [""]
    assert "got audio" in capsys.readouterr().err
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="hawk_trt"):
            method(requests)


def test_wrong_model_args_are_errors_of_ours(adapter, tiny_bundle, tmp_path):
    for arguments in ({"keep_ratio": 0.0}, {"selector": "best"}, {"head_weights": str(tmp_path / "none.json")}):
        with pytest.raises(HawkError):
            adapter.HawkTrt(str(tiny_bundle), **arguments)


TASK = """
dataset_path: json
dataset_kwargs:
  data_files: {{test: {samples}}}
task: hawk_tiny
test_split: test
output_type: generate_until
doc_to_visual: !function task.visual
doc_to_text: !function task.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false}}
process_results: !function task.score
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""


TASK_CODE = """
from PIL import Image
def visual(doc): return [Image.open(doc["image"]).convert("RGB")]
def text(doc, lmms_eval_specific_kwargs=None): return doc["question"]
def score(doc, results): return {"right": float(results[0].strip() == doc["answer"])}
"""


@pytest.mark.slow
def test_lmms_eval_itself_runs_a_task_on_a_bundle(tiny_bundle, tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: make check-harness HARNESS_PYTHON=...")
    lines = []
    for number, sample in enumerate(generate(11, WHOLE)):
        path = tmp_path / f"{number}.png"
        Image.fromarray(sample.image).save(path)
        lines.append(json.dumps({"image": str(path), "question": sample.question, "answer": sample.answer}))
    (tmp_path / "samples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "hawk_tiny.yaml").write_text(TASK.format(samples=tmp_path / "samples.jsonl"), encoding="utf-8")
    (tmp_path / "task.py").write_text(TASK_CODE, encoding="utf-8")
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "hawk_trt", "--tasks", "hawk_tiny"),
        *("--model_args", f"bundle={tiny_bundle},keep_ratio=0.2,trace={tmp_path / 'trace.jsonl'}"),
        *(
            "--include_path",
            str(tmp_path),
            "--batch_size",
            "2",
            "--log_samples",
            "--output_path",
            str(tmp_path / "out"),
        ),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hawk_trt: 12 answers, 156 of 768 visual tokens kept" in done.stderr
    assert "|hawk_tiny|none" in done.stdout
    (samples,) = (tmp_path / "out").rglob("*samples_hawk_tiny.jsonl")
    counts = [json.loads(line)["token_counts"][0] for line in samples.read_text().splitlines()]
    assert [(count["visual_tokens"], count["kept_visual_tokens"]) for count in counts] == [(64, 13)] * WHOLE
    assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == WHOLE
