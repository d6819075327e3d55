"""The adapters of the benchmark harnesses: against the packages where they are installed, else against their bases."""

import base64
import hashlib
import importlib.util
import io
import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import harness_standin
from examples.tiny_task import generate
from hawk_trt import Pipeline, PruningConfig, Request, SamplingConfig
from hawk_trt.apps.cli.vlmevalkit import main
from hawk_trt.apps.harness import answering, vlmevalkit
from hawk_trt.apps.harness.answering import Answering, device_of_rank
from hawk_trt.errors import HawkError, InvalidInput
from serving import MODEL, serving

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
    harness_standin.lmms_eval(monkeypatch)
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


def texts(results):
    return [result.text for result in results]


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


@pytest.fixture
def video(tmp_path):
    """A file of 11 frames."""
    frames = [Image.fromarray(np.full((32, 32, 3), 20 * number, np.uint8)) for number in range(11)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    return str(tmp_path / "clip.gif")


OF_VIDEOS = {"fps": 0.5, "max_frames": 16, "min_pixels": 4, "max_pixels": 8, "total_pixels": 9}


def test_vlmevalkits_parts_are_one_turn_of_the_user_in_their_order(video):
    """As its class for Qwen2.5-VL reads them: "Best option:(" of MVBench is the end of the question."""
    parts = [
        {"type": "text", "value": "Watch.", "role": "system"},
        {"type": "image", "value": "a.png", "resized_height": 280, "resized_width": 140},
        {"type": "video", "value": video},
        {"type": "text", "value": "Best option:(", "role": "assistant"},
    ]
    (turn,) = vlmevalkit.to_messages([{"role": "user", "content": parts}], "MVBench", OF_VIDEOS)
    assert turn == {
        "role": "user",
        "content": [
            {"type": "text", "text": "Watch."},
            {"type": "image", "image": "a.png", "resized_height": 280, "resized_width": 140},
            {"type": "video", "video": video, **OF_VIDEOS},
            {"type": "text", "text": "Best option:("},
        ],
    }
    with pytest.raises(InvalidInput, match="got type 'audio'"):
        vlmevalkit.to_messages([{"role": "user", "content": [{"type": "audio", "value": "a.wav"}]}], None, {})


@pytest.mark.parametrize(("wished", "taken"), [(8, 8), (64, 10), (7, 6), (1, 2)])
def test_a_number_of_frames_is_what_the_file_has_at_most_and_even(video, wished, taken):
    def item_of(part, of_videos):
        turns = [{"role": "user", "content": [{"type": "video", "value": video} | part]}]
        return vlmevalkit.to_messages(turns, None, of_videos)[0]["content"][0]

    expected = {"type": "video", "video": video, "nframes": taken}
    assert item_of({}, {"nframes": wished}) == item_of({"nframes": wished}, {"fps": 2, "max_frames": 3}) == expected


def test_the_smallest_image_of_ocrbench_is_its_own():
    turns = [{"role": "user", "content": [{"type": "image", "value": "a.png"}]}]
    assert vlmevalkit.to_messages(turns, "OCRBench", OF_VIDEOS)[0]["content"][0]["min_pixels"] == 78400
    assert "min_pixels" not in vlmevalkit.to_messages(turns, "OCRBench", {})[0]["content"][0]
    assert "min_pixels" not in vlmevalkit.to_messages(turns, "MME", OF_VIDEOS)[0]["content"][0]


@pytest.fixture
def supported(monkeypatch):
    """VLMEvalKit's table of models."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return harness_standin.vlmevalkit(monkeypatch)


@pytest.mark.usefixtures("supported")
def test_vlmevalkits_conversations_are_answered_turn_by_turn(pipe, samples):
    model = vlmevalkit.model_class()(Answering(pipe, PRUNING, system="Answer."), 8)
    first, second = samples[:2]
    turns = [
        {"role": "user", "content": [{"type": "text", "value": first.question}]},
        {"role": "assistant", "content": [{"type": "text", "value": first.answer}]},
        {"role": "user", "content": [{"type": "text", "value": second.question}]},
    ]
    said = [{"role": turn["role"], "content": turn["content"][0]["value"]} for turn in turns]
    whole = pipe.generate([{"role": "system", "content": "Answer."}, *said], pruning=PRUNING, max_new_tokens=8)
    assert model.chat([dict(turn) for turn in turns], dataset="MMDU") == whole.text


@pytest.mark.usefixtures("supported")
def test_a_question_that_vlmevalkit_shall_ask_again_says_so(pipe, tmp_path):
    model = vlmevalkit.model_class()(Answering(pipe, PRUNING, trace=tmp_path / "trace.jsonl"))
    message = [{"type": "text", "value": "?"}, {"type": "text", "value": "half \ud800"}]
    assert model.generate(message).startswith("Failed to obtain answer via API. requests[0]: messages[0] item 1")


RUN_PY = """
import json, sys
from pathlib import Path
from vlmeval.config import supported_VLM
assert sys.argv[1] == "--model"
model = supported_VLM[sys.argv[2]](use_vllm=False)
parts = json.loads(Path(sys.argv[4]).read_text())
print(json.dumps({"argv": sys.argv[2:4], "said": [model.generate(part, dataset="tiny") for part in parts]}))
"""


def test_vlmevalkit_is_run_with_one_command(supported, tiny_bundle, tmp_path, samples, expected, capsys):
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "run.py").write_text(RUN_PY, encoding="utf-8")
    parts = []
    for number, sample in enumerate(samples):
        path = tmp_path / f"{number}.png"
        Image.fromarray(sample.image).save(path)
        parts.append([{"type": "image", "value": str(path)}, {"type": "text", "value": sample.question}])
    (tmp_path / "parts.json").write_text(json.dumps(parts), encoding="utf-8")
    own = [str(tiny_bundle), "--vlmevalkit", str(clone), "--name", "Qwen2.5-VL-7B", "--keep-ratio", "0.2"]
    own += ["--trace", str(tmp_path / "trace.jsonl")]
    assert main([*own, "--", "--data", str(tmp_path / "parts.json")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"argv": ["Qwen2.5-VL-7B", "--data"], "said": expected}
    assert "4 answers, 52 of 256 visual tokens kept" in err
    traced = [json.loads(line)["answer"] for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert traced == expected
    with pytest.raises(InvalidInput, match="--use-vllm"):
        supported["Qwen2.5-VL-7B"](use_vllm=True)


def test_vlmevalkit_that_is_not_there_is_one_line(tiny_bundle, tmp_path, capsys, monkeypatch):
    assert main([str(tiny_bundle), "--vlmevalkit", str(tmp_path), "--", "--data", "MME"]) == 1
    assert "expected a clone of VLMEvalKit" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", None)
    assert main([str(tiny_bundle), "--", "--data", "MME"]) == 1
    assert "pip install ms-vlmeval" in capsys.readouterr().err


NO_VLMEVALKIT = "VLMEvalKit is not installed: make check-harness HARNESS_PYTHON=... runs this"
WHOLE = 12


@pytest.mark.parametrize(("nframe", "fps"), [(8, -1), (0, 0.5)])
def test_vlmevalkit_itself_sets_the_frames_of_its_data_set(pipe, tmp_path, nframe, fps):
    pytest.importorskip("vlmeval", reason=NO_VLMEVALKIT)
    from vlmeval.inference_video import infer_data

    model = vlmevalkit.model_class()(Answering(pipe, PRUNING))
    dataset = harness_standin.VideoDataset(nframe, fps)
    infer_data(model, "Qwen2.5-VL-7B", str(tmp_path), dataset, str(tmp_path / "out.pkl"))
    assert (model.fps, model.nframe) == ((None, 8) if nframe else (0.5, None))


def test_vlmevalkit_itself_runs_a_data_set_on_a_bundle(pipe, tiny_bundle, tmp_path, monkeypatch):
    pytest.importorskip("vlmeval", reason=NO_VLMEVALKIT)
    import pandas as pd

    harness_standin.vlmevalkit(monkeypatch)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("LMUData", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    samples = list(generate(11, WHOLE))
    rows = {"index": range(WHOLE), "image": [png(s) for s in samples], "question": [s.question for s in samples]}
    pd.DataFrame(rows).to_csv(tmp_path / "HawkTiny.tsv", sep="\t", index=False)
    own = [str(tiny_bundle), "--name", "Qwen2.5-VL-tiny", "--keep-ratio", "0.2"]
    try:
        assert main([*own, "--", "--data", "HawkTiny", "--mode", "infer", "--work-dir", str(tmp_path / "out")]) == 0
    finally:
        logging.disable(logging.NOTSET)
    found = pd.read_excel(next((tmp_path / "out").rglob("*HawkTiny*.xlsx")), dtype=str)
    expected = [pipe.generate(s.question, [s.image], pruning=PRUNING, max_new_tokens=8).text for s in samples]
    assert found["prediction"].tolist() == expected


def png(sample):
    """A picture as VLMEvalKit's tables hold it."""
    file = io.BytesIO()
    Image.fromarray(sample.image).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_vlmevalkits_client_asks_the_server_for_its_pruning(tiny_bundle, tmp_path, samples, expected):
    """The API route: what its configuration names beside its own goes into the body, pruning too."""
    api = pytest.importorskip("vlmeval.api", reason=NO_VLMEVALKIT)
    Image.fromarray(samples[0].image).save(tmp_path / "a.png")
    message = [{"type": "image", "value": str(tmp_path / "a.png")}, {"type": "text", "value": samples[0].question}]
    with serving(tiny_bundle, pruning=PruningConfig(keep_ratio=1.0)) as server:
        url = f"{server.url}/v1/chat/completions"
        settings = {"model": MODEL, "api_base": url, "key": "none", "img_size": -1, "img_detail": "high", "retry": 1}
        client = api.GPT4V(max_tokens=8, pruning={"keep_ratio": 0.2}, **settings)
        assert client.generate(message) == expected[0]
        assert 'hawk_tokens_total{kind="kept_visual"} 13.0' in server.http.get("/metrics").text
        wrong = api.GPT4V(wait=0, pruning={"keep_ratio": 7}, **settings)
        assert "Failed to obtain answer" in wrong.generate(message)


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
