import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from export.__main__ import main as export
from hawk_trt import Pipeline, PruningConfig, SamplingConfig
from hawk_trt.apps.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def sample(tiny_checkpoint):
    """A picture, a question about it, and its answer."""
    entry = json.loads((tiny_checkpoint / "samples" / "samples.json").read_text())[0]
    return tiny_checkpoint / "samples" / entry["image"], entry["question"], entry["answer"]


@pytest.fixture
def ask(tiny_bundle, sample):
    """The arguments of a `run` that works."""
    image, question, _ = sample
    return ["run", str(tiny_bundle), "--image", str(image), "--prompt", question]


def start(*args, code="", **settings):
    program = [sys.executable, "-c", code] if code else [sys.executable, "-m", "hawk_trt"]
    environment = os.environ | {"HAWK_DEBUG": "0"} | settings.pop("env", {})
    return subprocess.run(
        [*program, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment, **settings
    )


def usage_error(argv):
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in argv])
    return stop.value.code


def test_run_prints_the_answer_alone_on_stdout(ask, sample, capsys):
    assert main([*ask, "--keep-ratio", "0.2"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{sample[2]}\n"
    assert "13 kept of 64 (20.3 %)" in err
    assert all(stage in err for stage in ("preprocess", "vision", "first_layer", "decoder", "decode", "total"))


def test_run_takes_the_keep_ratio_of_the_bundle_unless_told(ask, tiny_bundle, capsys):
    ratio = json.loads((tiny_bundle / "bundle.json").read_text())["keep_ratio"]
    assert main([*ask, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keep_ratio"] == ratio


def test_run_as_json_holds_the_whole_result(ask, sample, capsys, tmp_path):
    picture = tmp_path / "kept.png"
    assert main([*ask, "--json", "--keep-ratio", "0.1", "--picture", str(picture)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["text"], result["num_visual"], result["num_kept"]) == (sample[2], 64, 7)
    assert len(result["scores"]) == 64
    assert len(result["kept_indices"]) > 7
    assert result["finish_reason"] == "stop"
    assert result["timings"]["total"] > 0
    assert result["picture"] == str(picture)
    with Image.open(picture) as drawn:
        assert drawn.width > 400


def test_run_streams_on_a_terminal_and_ends_the_line(ask, sample):
    reader, terminal = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-m", "hawk_trt", *ask], cwd=ROOT, stdout=terminal, stderr=subprocess.PIPE, timeout=300
    )
    os.close(terminal)
    shown = os.read(reader, 4096).decode()
    os.close(reader)
    assert done.returncode == 0
    assert shown.replace("\r\n", "\n") == f"{sample[2]}\n"


def test_a_picture_that_cannot_be_written_does_not_cost_the_answer(ask, sample, tmp_path, capsys):
    for command in ("run", "explain"):
        option = {"run": "--picture", "explain": "--out"}[command]
        assert main([command, *ask[1:], option, str(tmp_path)]) == 1
        out, err = capsys.readouterr()
        assert sample[2] in out
        assert f"error: {tmp_path}" in err
    assert not list(tmp_path.iterdir())


def test_the_prompt_can_come_from_stdin(ask, sample):
    done = start(*ask[:-1], "-", input=f"{sample[1]}\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{sample[2]}\n"


def test_a_prompt_without_images_prunes_nothing_and_draws_nothing(tiny_bundle, capsys, tmp_path):
    picture = tmp_path / "kept.png"
    argv = ["run", str(tiny_bundle), "--prompt", "Hello", "--max-new-tokens", "2", "--picture", str(picture)]
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert "nothing was pruned" in err
    assert "not drawn" in err
    assert not picture.exists()


def test_options_reach_the_pipeline(ask, sample, capsys, tmp_path):
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps({"values": [1.0] + [0.0] * 7, "source": "a test"}))

    def result(*options):
        assert main([*ask, "--json", *map(str, options)]) == 0
        return json.loads(capsys.readouterr().out)

    plain = result()
    assert result("--head-weights", weights)["scores"] != plain["scores"]
    assert result("--min-visual-tokens", 40)["num_kept"] == 40
    assert result("--max-new-tokens", 1)["finish_reason"] == "length"
    assert result("--stop", sample[2][1:])["text"] == sample[2][:1]
    assert result("--max-pixels", 112 * 112)["num_visual"] == 16
    assert result("--query", "turn")["scores"]
    assert result("--target", "portable")["token_ids"] == plain["token_ids"]
    assert len(result("--system", "Answer in French, at length.")["kept_indices"]) > len(plain["kept_indices"])
    drawn = [result("--temperature", 30, "--seed", seed, "--max-new-tokens", 8)["token_ids"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_sampling_is_that_of_the_model_where_asked_for_and_other_options_win(sampling_bundle, sample, capsys):
    image, question, _ = sample

    def tokens(*options):
        command = ["run", sampling_bundle, "--image", image, "--prompt", question, "--json", "--keep-ratio", 1]
        assert main(list(map(str, [*command, *options]))) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    drawn = ["--sampling", "model", "--seed", 5, "--max-new-tokens", 12]
    with Pipeline.load(sampling_bundle) as pipe:

        def expected(**settings):
            sampling = SamplingConfig(**settings)
            return pipe.generate(question, [image], (), PruningConfig(1.0), 12, sampling).token_ids

        said = {"temperature": 30.0, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.8, "seed": 5}
        assert tokens() == expected()
        assert tokens(*drawn) == expected(**said) != expected()
        assert tokens(*drawn, "--top-k", 2, "--min-p", 0.2) == expected(**said | {"top_k": 2, "min_p": 0.2})
        assert tokens(*drawn, "--temperature", 0) == expected(repetition_penalty=1.8)
        penalties = ["--presence-penalty", 2, "--frequency-penalty", 1.5, "--max-new-tokens", 12]
        assert tokens(*penalties) == expected(presence_penalty=2.0, frequency_penalty=1.5)


def test_special_tokens_are_shown_where_asked_for(tiny_checkpoint, sample, tmp_path, capsys):
    image, question, answer = sample
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    first = Tokenizer.from_file(str(file)).encode(answer, add_special_tokens=False).tokens[0]
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entry = {"id": tokenizer["model"]["vocab"][first], "content": first, **added}
    tokenizer["added_tokens"].insert(0, entry)  # as action tokens are
    file.write_text(json.dumps(tokenizer))
    assert export([str(folder), "--out", str(tmp_path / "bundle"), "--target", "cpu"]) == 0
    capsys.readouterr()
    shown = []
    for flags in ([], ["--no-skip-special-tokens"]):
        assert main(["run", str(tmp_path / "bundle"), "--image", str(image), "--prompt", question, *flags]) == 0
        shown.append(capsys.readouterr().out.strip())
    assert shown == [answer.removeprefix(first), answer]


def test_each_image_keeps_its_quota(ask, capsys):
    image = ask[3]
    assert main([*ask, "--image", image, "--quota", "per-image", "--keep-ratio", "0.1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_visual"], result["num_kept"]) == (128, 14)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep-ratio", "0"], "keep_ratio: got 0.0, expected a number in (0, 1]"),
        (["--keep-ratio", "nan"], "keep_ratio"),
        (["--keep-ratio", "2"], "keep_ratio"),
        (["--min-visual-tokens", "0"], "min_visual_tokens"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--seed", "-1"], "seed"),
        (["--head-weights", "no-such-file.json"], "no-such-file.json"),
        (["--image", "no-such-image.png"], "no-such-image.png"),
        (["--video", "no-such-clip.mp4"], "no-such-clip.mp4"),
        (["--prompt", "  "], "--prompt"),
        (["--device", "abacus"], "device: got 'abacus'"),
        (["--min-pixels", "100000000"], "min_pixels"),
    ],
)
def test_what_cannot_be_used_is_one_line_with_a_command_to_try_and_exit_code_1(ask, options, message, capsys):
    assert main([*ask, *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    told, tried = err.splitlines()
    assert told.startswith("error: ") and message in told
    assert tried.startswith("  try: hawk-trt run ")


@pytest.mark.parametrize("content", ["[", "{}", '["a"]', "[NaN]", "[-1.0]", "[0, 0]", "[1, 2]", "\udcff"])
def test_head_weights_that_cannot_be_used_are_refused(ask, content, tmp_path, capsys):
    file = tmp_path / "weights.json"
    file.write_bytes(content.encode(errors="surrogateescape"))
    assert main([*ask, "--head-weights", str(file)]) == 1
    assert "head" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["frobnicate"],
        ["run"],
        ["run", "bundle"],
        ["run", "bundle", "--prompt", "?", "--keep-ratio", "much"],
        ["run", "bundle", "--prompt", "?", "--quota", "none"],
        ["run", "bundle", "--prompt", "?", "--max-new", "3"],
        ["explain", "bundle", "--prompt", "?", "--keep-ratios", "0.1;0.2"],
        ["doctor", "a", "b"],
    ],
)
def test_wrong_usage_is_exit_code_2(argv, capsys):
    assert (usage_error(argv) if argv else main(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: hawk-trt COMMAND" in err if not argv else err.startswith("error: ")
    assert not argv or err.count("\n") <= 2  # what is wrong, and a command that works
    assert not argv or f"See: hawk-trt {argv[0]} --help" in err or "See: hawk-trt --help" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    assert usage_error([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"Usage: hawk-trt {command}" in told
    assert f"Example: hawk-trt {command} " in told


def test_help_loads_no_runtime_and_nothing_loads_torch(ask):
    code = (
        "import sys\nfrom hawk_trt.apps.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as stop:\n    code = stop.code\n"
        "print(*sorted({'onnxruntime', 'torch', 'transformers', 'av'} & set(sys.modules)), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    done = start("run", "--help", code=code)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    done = start(*ask, code=code)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "onnxruntime")


def test_a_traceback_is_shown_on_request_only(tmp_path):
    argv = ("run", tmp_path, "--prompt", "?")
    quiet, loud = start(*argv), start(*argv, env={"HAWK_DEBUG": "1"})
    assert quiet.returncode == loud.returncode == 1
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert loud.stderr.endswith(quiet.stderr)


def test_an_interrupt_is_exit_code_130():
    code = (
        "import sys, hawk_trt.apps.cli.doctor as doctor\n"
        "def interrupted(): raise KeyboardInterrupt\n"
        "doctor.doctor = interrupted\n"
        "from hawk_trt.apps.cli.main import main; sys.exit(main(['doctor']))\n"
    )
    done = start(code=code)
    assert (done.returncode, done.stderr.strip()) == (130, "")


def test_a_reader_that_leaves_early_causes_no_noise():
    command = f"{sys.executable} -m hawk_trt doctor --json | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""


def test_an_answer_beyond_the_terminals_encoding_is_still_printed():
    code = (
        "import sys, hawk_trt.apps.cli.doctor as doctor\n"
        "doctor.doctor = lambda: print('caf\\u00e9 \\u732b') or 0\n"
        "from hawk_trt.apps.cli.main import main; sys.exit(main(['doctor']))\n"
    )
    done = start(code=code, env={"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "caf? ?\n")


def test_a_full_disk_is_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hawk_trt", "doctor"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"


def test_explain_draws_and_tells_every_keep_ratio(ask, sample, tmp_path, capsys):
    picture = tmp_path / "pictures" / "explained.png"
    argv = ["explain", *ask[1:], "--keep-ratios", "0.1,0.5", "--out", str(picture), "--json"]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["prompt"], told["num_visual"]) == (sample[1], 64)
    (item,) = told["items"]
    assert item["grid"] == [1, 8, 8]
    assert [selection["num_kept"] for selection in told["selections"]] == [7, 32]
    assert [selection["answer"] for selection in told["selections"]] == [sample[2]] * 2
    few, many = (np.array(selection["kept"][0][0]) for selection in told["selections"])
    assert (few.sum(), many.sum()) == (7, 32)
    scores = np.array(item["scores"][0])
    assert scores[few].min() >= scores[~few].max()
    with Image.open(picture) as drawn:
        assert drawn.format == "PNG"
        assert drawn.width > 1000


@pytest.fixture(scope="module")
def video_bundle(tiny_checkpoint, tmp_path_factory):
    """The tiny model with a chat template that takes videos, as those of the released models do."""
    from export.__main__ import main as export

    folder = tmp_path_factory.mktemp("video")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint", ignore=shutil.ignore_patterns("samples"))
    template = folder / "checkpoint" / "chat_template.jinja"
    image = "{% if c['type'] == 'image' or 'image' in c %}<|vision_start|><|image_pad|><|vision_end|>"
    video = "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    assert image in template.read_text()
    template.write_text(template.read_text().replace(image, image + video))
    assert export([str(folder / "checkpoint"), "--out", str(folder / "bundle")]) == 0
    return folder / "bundle"


def write_video(path, frames):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def test_explain_draws_the_steps_of_a_video_beside_an_image(video_bundle, sample, tmp_path, capsys):
    path, picture = tmp_path / "clip.mp4", tmp_path / "e.png"
    # Each frame has its own brightness, so that the picture shows which ones were drawn.
    write_video(path, [np.full((112, 112, 3), 16 * index, np.uint8) for index in range(16)])
    visual = ["--video", str(path), "--image", str(sample[0])]
    argv = ["explain", str(video_bundle), *visual, "--prompt", "Count the circles.", "--max-new-tokens", "2"]
    assert main([*argv, "--keep-ratios", "1.0", "--json", "--out", str(picture)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(item["kind"], item["grid"]) for item in told["items"]] == [("image", [1, 8, 8]), ("video", [8, 4, 4])]
    with Image.open(picture) as drawn:
        column = np.asarray(drawn.convert("L"))[:, 40].astype(int)
    shown = [value for value in range(256) if (abs(column - value) <= 1).sum() > 250 and value < 240]
    steps = np.linspace(0, 7, 6).round().astype(int)
    assert [min(abs(value - 32 * step) for value in shown) <= 4 for step in steps] == [True] * 6


def test_explain_prints_a_table(ask, sample, tmp_path, capsys):
    assert main(["explain", *ask[1:], "--keep-ratios", "0.2", "--out", str(tmp_path / "e.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["0.2", "13", "of", "64", *sample[2].split()]


def test_explain_without_an_image_says_what_is_missing(tiny_bundle, tmp_path, capsys):
    assert main(["explain", str(tiny_bundle), "--prompt", "Hello", "--out", str(tmp_path / "e.png")]) == 1
    assert "--image" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_doctor_finds_a_bundle_whole(tiny_bundle, capsys):
    assert main(["doctor", str(tiny_bundle)]) == 0
    out, err = capsys.readouterr()
    assert "whole, every file as exported" in out
    assert "tiny-vlm" in out
    assert "verifying" in err


@pytest.mark.parametrize("weights", [True, False])
def test_doctor_and_verify_find_a_changed_byte(tiny_bundle, weights, tmp_path, capsys, ask):
    damaged = tmp_path / "bundle"
    damaged.mkdir()
    entries = json.loads((tiny_bundle / "bundle.json").read_text())["files"]
    victim = next(name for name, entry in entries.items() if entry.get("weights", False) is weights)
    for path in tiny_bundle.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    content = bytearray((damaged / victim).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / victim).write_bytes(content)

    assert main(["doctor", str(damaged)]) == 1
    out, err = capsys.readouterr()
    assert "not usable" in out
    assert victim in err
    assert main(["doctor", str(damaged), "--json"]) == 1
    assert victim in json.loads(capsys.readouterr().out)["bundle"]["problem"]
    assert main(["run", str(damaged), *ask[2:], "--verify"]) == 1
    assert victim in capsys.readouterr().err


def test_doctor_of_no_bundle_says_how_to_make_one(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 1
    assert "hawk-trt export" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [
        (["rum", "bundle"], 'Did you mean "run"?'),
        (["run", "bundle", "--promt", "?"], "Did you mean --prompt"),
        (["run", "bundle", "--prompt", "?", "--keep-rato", "0.2"], "Did you mean --keep-ratio"),
        (["run", "bundle", "--prompt", "?", "--selector", "hawks"], '"hawk"'),
    ],
)
def test_a_misspelt_word_is_answered_with_the_right_one(argv, suggestion, capsys):
    assert usage_error(argv) == 2
    assert suggestion in capsys.readouterr().err


def test_flags_have_the_names_that_others_give_them(ask, capsys):
    words = ["run", "--model", ask[1], *ask[2:], "--max-tokens", "1", "--keep-ratios", "0.1", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (len(result["token_ids"]), result["keep_ratio"]) == (1, 0.1)
    assert main([*words[:-1], "--keep-ratio", "0.5", "--json"]) == 0  # the last one counts
    assert json.loads(capsys.readouterr().out)["keep_ratio"] == 0.5


def test_a_checkpoint_is_exported_once_and_then_answers(ask, sample, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for told in (True, False):
        assert main(["run", str(tiny_checkpoint), *ask[2:]]) == 0
        out, err = capsys.readouterr()
        assert out == f"{sample[2]}\n"
        assert ("Exporting it in float32" in err) is told
    (folder,) = (tmp_path / "hawk_trt" / "bundles").iterdir()
    assert (folder / "bundle.json").is_file()


def test_what_is_named_in_anothers_place_is_recognised(tiny_bundle, tiny_checkpoint, tmp_path, capsys):
    engines = tmp_path / "engines"
    engines.mkdir()
    (engines / "engines.json").write_text("{}")
    out = str(tmp_path / "out")
    for argv, command in (
        (["export", tiny_bundle, "--out", out], f"hawk-trt run {tiny_bundle} --prompt TEXT"),
        (["export", engines, "--out", out], f"hawk-trt run {engines} --prompt TEXT"),
        (["build", tiny_checkpoint, "--out", out], f"hawk-trt export {tiny_checkpoint} --out tiny-vlm-bundle"),
        (["build", "Qwen/Qwen2.5-VL-3B-Instruct", "--out", out], "hawk-trt export Qwen/Qwen2.5-VL-3B-Instruct --out"),
        (["build", engines, "--out", out], f"hawk-trt run {engines} --prompt TEXT"),
        (["run", tmp_path, "--prompt", "?"], f"hawk-trt run {engines} --prompt '?'"),
    ):
        assert main([str(word) for word in argv]) == 1
        err = capsys.readouterr().err
        assert command in err and err.count("\n") == 2
    assert not Path(out).exists()


def test_doctor_tells_the_versions_that_the_tests_pass_with(capsys):
    assert main(["doctor", "--json"]) == 0
    tested = json.loads(capsys.readouterr().out)["tested"]
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert tested == pins and {"numpy", "onnxruntime", "cyclopts"} <= set(tested)
