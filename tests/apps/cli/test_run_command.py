"""hawk-trt run."""

import base64
import json
import os
import pty
import shutil
import subprocess
import sys

from PIL import Image
from tokenizers import Tokenizer

from command_line import ROOT, start
from export.__main__ import main as export
from hawk_trt import Pipeline, PruningConfig, SamplingConfig
from hawk_trt.apps.cli.main import main


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


def test_the_picture_does_not_take_the_place_of_the_photo(ask, sample, tmp_path, capsys):
    photo = tmp_path / "photo.png"
    photo.write_bytes(sample[0].read_bytes())
    assert main([*ask[:2], "--image", str(photo), "--prompt", "hi", "--picture", str(photo)]) == 1
    assert "would take the place" in capsys.readouterr().err
    assert photo.read_bytes() == sample[0].read_bytes()
    url = f"data:image/png;base64,{base64.b64encode(sample[0].read_bytes()).decode()}"
    assert main([*ask[:2], "--image", url, "--prompt", "hi", "--picture", str(photo)]) == 0
    assert photo.read_bytes() != sample[0].read_bytes()


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
    assert result("--query", "last")["scores"] == result("--selector", "fastv-input")["scores"] != plain["scores"]
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
    with Pipeline.load(sampling_bundle, threads=1) as pipe:

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
