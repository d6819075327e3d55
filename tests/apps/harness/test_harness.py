"""The adapters of the benchmark harnesses: against the packages where they are installed, else against their bases."""

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from PIL import Image

from examples.tiny_task import generate
from harness_standin import BaseModel, lmms, modules
from hawk_trt import Pipeline, PruningConfig, SamplingConfig
from hawk_trt.apps.cli.vlmevalkit import main
from hawk_trt.apps.harness import vlmevalkit
from hawk_trt.apps.harness.answering import Answering
from hawk_trt.errors import HawkError, InvalidInput

PRUNING = PruningConfig(keep_ratio=0.2)


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    with Pipeline.load(tiny_bundle) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def samples():
    return list(generate(11, 4))


@pytest.fixture(scope="module")
def expected(pipe, samples):
    return [pipe.generate(s.question, [s.image], pruning=PRUNING, max_new_tokens=8).text for s in samples]


@pytest.fixture
def adapter(monkeypatch):
    """The lmms-eval adapter's module."""
    if importlib.util.find_spec("lmms_eval") is None:
        for name, module in modules(lmms, "lmms_eval.api.model").items():
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "hawk_trt.apps.harness.lmms_eval", raising=False)
    return importlib.import_module("hawk_trt.apps.harness.lmms_eval")


def turn(sample, **more):
    content = [{"type": "image", "url": Image.fromarray(sample.image)}, {"type": "text", "text": sample.question}]
    return [{"role": "user", "content": [*content, *more.get("items", ())]}]


def ask(model, documents, messages, settings):
    """Requests as lmms-eval makes them: (context, doc_to_messages, generation_kwargs, doc_id, task, split)."""
    model.task_dict["task"] = {"test": documents}
    each = settings if isinstance(settings, list) else [settings] * len(documents)
    return [
        SimpleNamespace(args=("context", messages, kwargs, number, "task", "test"))
        for number, kwargs in enumerate(each)
    ]


def test_answers_are_the_pipelines_and_what_was_kept_is_counted(pipe, samples, expected):
    answering = Answering(pipe, PRUNING)
    conversations = [
        [{"role": "user", "content": [{"type": "image", "image": s.image}, {"type": "text", "text": s.question}]}]
        for s in samples
    ]
    assert answering.answer(conversations[:3], 8) + answering.answer(conversations[3:], 8) == expected
    assert answering.summary().startswith("hawk_trt: 4 answers, 52 of 256 visual tokens kept (20.3 %), ")


@pytest.mark.parametrize("batch_size", ["1", "3", "auto"])
def test_lmms_eval_gets_an_answer_to_each_request_in_its_order(
    adapter, tiny_bundle, samples, expected, capsys, batch_size
):
    arguments = f"bundle={tiny_bundle},keep_ratio=0.2"
    model = adapter.HawkTrt.create_from_arg_string(arguments, {"batch_size": batch_size, "device": None})
    settings = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "num_beams": 1, "top_p": None}
    requests = ask(model, samples, turn, [settings, settings, settings | {"until": ["\n\n"]}, settings])
    assert model.generate_until(requests) == expected
    assert "4 answers, 52 of 256 visual tokens kept" in capsys.readouterr().err
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
    assert said == [whole.text]


@pytest.mark.parametrize(
    ("settings", "item", "message"),
    [
        ({"num_beams": 4}, None, "num_beams: got 4"),
        ({}, {"type": "audio", "url": "a.wav"}, "got audio"),
        ({}, {"type": "video", "url": "a.mp4", "start_time": 3.0}, "a part of a video"),
    ],
)
def test_what_lmms_eval_asks_and_cannot_be_done_is_an_error(adapter, tiny_bundle, samples, settings, item, message):
    model = adapter.HawkTrt(str(tiny_bundle))
    requests = ask(model, samples[:1], lambda sample: turn(sample, items=[item] if item else []), settings)
    with pytest.raises(InvalidInput, match=message):
        model.generate_until(requests)
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="hawk_trt"):
            method(requests)


def test_wrong_model_args_are_errors_of_ours(adapter, tiny_bundle, tmp_path):
    for arguments in ({"keep_ratio": 0.0}, {"selector": "best"}, {"head_weights": str(tmp_path / "none.json")}):
        with pytest.raises(HawkError):
            adapter.HawkTrt(str(tiny_bundle), **arguments)


def test_vlmevalkits_parts_become_messages_in_their_order():
    parts = [
        {"type": "text", "value": "Be brief.", "role": "system"},
        {"type": "image", "value": "a.png"},
        {"type": "text", "value": "Which?"},
        {"type": "video", "value": "b.mp4"},
    ]
    assert vlmevalkit.to_messages(parts, "unused", 2.0, None) == [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "Which?"},
                {"type": "video", "video": "b.mp4", "fps": 2.0},
            ],
        },
    ]
    assert vlmevalkit.to_messages(parts[1:], "Be exact.", None, 8)[0] == {"role": "system", "content": "Be exact."}
    with pytest.raises(InvalidInput, match="got type 'audio'"):
        vlmevalkit.to_messages([{"type": "audio", "value": "a.wav"}], None, None, None)


RUN_PY = """
import json, sys
from pathlib import Path
from vlmeval.config import supported_VLM
assert sys.argv[1] == "--model"
model = supported_VLM[sys.argv[2]]()
parts = json.loads(Path(sys.argv[4]).read_text())
print(json.dumps({"argv": sys.argv[2:4], "said": [model.generate(part, dataset="tiny") for part in parts]}))
"""


def test_vlmevalkit_is_run_with_one_command(tiny_bundle, tmp_path, samples, expected, monkeypatch, capsys):
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "run.py").write_text(RUN_PY, encoding="utf-8")
    config = {"vlmeval.config": SimpleNamespace(supported_VLM={})}
    for name, module in (modules(BaseModel, "vlmeval.vlm.base") | config).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    parts = []
    for number, sample in enumerate(samples):
        path = tmp_path / f"{number}.png"
        Image.fromarray(sample.image).save(path)
        parts.append([{"type": "image", "value": str(path)}, {"type": "text", "value": sample.question}])
    (tmp_path / "parts.json").write_text(json.dumps(parts), encoding="utf-8")
    own = [str(tiny_bundle), "--vlmevalkit", str(clone), "--name", "mine", "--keep-ratio", "0.2"]
    assert main([*own, "--max-new-tokens", "8", "--", "--data", str(tmp_path / "parts.json")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"argv": ["mine", "--data"], "said": expected}
    assert "4 answers, 52 of 256 visual tokens kept" in err


def test_vlmevalkit_that_is_not_there_is_one_line(tiny_bundle, tmp_path, capsys):
    assert main([str(tiny_bundle), "--vlmevalkit", str(tmp_path), "--", "--data", "MME"]) == 1
    assert "expected a clone of VLMEvalKit" in capsys.readouterr().err


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
def test_lmms_eval_itself_runs_a_task_on_a_bundle(tiny_bundle, tmp_path, samples):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install 'hawk-trt[lmms-eval]'")
    lines = []
    for number, sample in enumerate(samples):
        path = tmp_path / f"{number}.png"
        Image.fromarray(sample.image).save(path)
        lines.append(json.dumps({"image": str(path), "question": sample.question, "answer": sample.answer}))
    (tmp_path / "samples.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "hawk_tiny.yaml").write_text(TASK.format(samples=tmp_path / "samples.jsonl"), encoding="utf-8")
    (tmp_path / "task.py").write_text(TASK_CODE, encoding="utf-8")
    command = [
        *(sys.executable, "-m", "lmms_eval", "--model", "hawk_trt", "--tasks", "hawk_tiny"),
        *("--model_args", f"bundle={tiny_bundle},keep_ratio=0.2", "--include_path", str(tmp_path), "--batch_size", "2"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hawk_trt: 4 answers, 52 of 256 visual tokens kept" in done.stderr
    assert "|hawk_tiny|none" in done.stdout
