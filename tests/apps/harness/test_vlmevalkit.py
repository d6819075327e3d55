"""The adapter of VLMEvalKit: against the package where it is installed, else against its base."""

import base64
import io
import json
import logging
import sys

import pytest
from PIL import Image

import harness_standin
from examples.tiny_task import generate
from harness_questions import PRUNING, WHOLE
from hawk_trt import PruningConfig
from hawk_trt.apps.cli.vlmevalkit import main
from hawk_trt.apps.harness import vlmevalkit
from hawk_trt.apps.harness.answering import Answering
from hawk_trt.errors import InvalidInput
from serving import MODEL, serving

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


def lies_in(folder, monkeypatch):
    """Have the package vlmeval lie in a folder."""
    (folder / "vlmeval").mkdir()
    package = sys.modules["vlmeval"]
    monkeypatch.setattr(package, "__path__", [str(folder / "vlmeval")], raising=False)
    monkeypatch.setattr(package, "__file__", str(folder / "vlmeval" / "__init__.py"), raising=False)


@pytest.mark.parametrize("script", ["vlmeval/run.py", "run.py"])
def test_vlmevalkit_is_run_with_one_command(
    script, supported, tiny_bundle, tmp_path, samples, expected, capsys, monkeypatch
):
    """The packages have run.py within, a clone has it beside the package."""
    lies_in(tmp_path, monkeypatch)
    (tmp_path / script).write_text(RUN_PY, encoding="utf-8")
    parts = []
    for number, sample in enumerate(samples):
        path = tmp_path / f"{number}.png"
        Image.fromarray(sample.image).save(path)
        parts.append([{"type": "image", "value": str(path)}, {"type": "text", "value": sample.question}])
    (tmp_path / "parts.json").write_text(json.dumps(parts), encoding="utf-8")
    own = [str(tiny_bundle), "--name", "Qwen2.5-VL-7B", "--keep-ratio", "0.2"]
    own += ["--trace", str(tmp_path / "trace.jsonl")]
    assert main([*own, "--", "--data", str(tmp_path / "parts.json")]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"argv": ["Qwen2.5-VL-7B", "--data"], "said": expected}
    assert "4 answers, 52 of 256 visual tokens kept" in err
    traced = [json.loads(line)["answer"] for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert traced == expected
    with pytest.raises(InvalidInput, match="--use-vllm"):
        supported["Qwen2.5-VL-7B"](use_vllm=True)


@pytest.mark.usefixtures("supported")
def test_vlmevalkit_that_is_not_there_is_one_line(tiny_bundle, tmp_path, capsys, monkeypatch):
    lies_in(tmp_path, monkeypatch)
    assert main([str(tiny_bundle), "--", "--data", "MME"]) == 1
    assert f"{tmp_path / 'run.py'}: no such file, expected VLMEvalKit" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vlmeval.vlm.base", None)
    assert main([str(tiny_bundle), "--", "--data", "MME"]) == 1
    assert "pip install ms-vlmeval" in capsys.readouterr().err


NO_VLMEVALKIT = "VLMEvalKit is not installed: make check-harness HARNESS_PYTHON=... runs this"


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
