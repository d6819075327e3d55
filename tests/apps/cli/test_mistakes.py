"""Mistakes that people make, and the command that each is answered with."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from hawk_trt.apps.cli.main import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[3]

HUB = "Qwen/Qwen2.5-VL-3B-Instruct"
# The words, a part of the first line, a part of the second: the command to try.
MISTAKES = [
    # the command
    ("runn bundle -p hi", 'Unknown command "runn"', "hawk-trt run bundle -p hi"),
    ("convert model --out x", 'Did you mean "export"', "hawk-trt export model --out x"),
    ("benchmark bundle", 'Did you mean "bench"', "hawk-trt bench bundle"),
    ("bundle --prompt hi", "Unknown command", "hawk-trt run bundle --prompt hi"),
    (f"{HUB} --prompt hi", "Unknown command", f"hawk-trt run {HUB} --prompt hi"),
    ("--model bundle run --prompt hi", "Unknown command", "hawk-trt run --model bundle --prompt hi"),
    # what is missing
    ("run", "--model requires", "hawk-trt run CHECKPOINT-OR-HUB-ID"),
    ("run bundle", "--prompt requires", "hawk-trt run bundle --prompt 'What is shown here?'"),
    ("run bundle --prompt", "--prompt requires", "hawk-trt run bundle --prompt 'What is shown here?'"),
    ("export model", "--out requires", "hawk-trt export model --out model-bundle"),
    ("build bundle", "--out requires", "hawk-trt build bundle --out bundle-engines"),
    ("parity bundle", "--checkpoint requires", "hawk-trt parity bundle --checkpoint CHECKPOINT"),
    ("explain bundle -p hi", "no image or video", "hawk-trt explain bundle -p hi --image 'my photo.png'"),
    # values without their flag, and flags without their value
    ("run bundle hi", "--prompt requires", "hawk-trt run bundle --prompt hi"),
    ("run bundle photo.png -p hi", "without an option", "hawk-trt run bundle --image photo.png -p hi"),
    ("run bundle photo.png hi", "--prompt requires", "hawk-trt run bundle --image photo.png --prompt hi"),
    ("run bundle --prompt --image photo.png", "photo.png", "--prompt 'What is shown here?' --image photo.png"),
    ("export model out", "--out requires", "hawk-trt export model --out out"),
    ("serve bundle 8000", "without an option", "hawk-trt serve bundle --port 8000"),
    ("chat bundle hi", "without an option", "hawk-trt run bundle --prompt hi"),
    # flags: misspelt, or another program's
    ("run bundle --promt hi", "--prompt requires", "hawk-trt run bundle --prompt hi"),
    ("run bundle -p hi --keep-rato 0.2", "--keep-rato", "--keep-ratio 0.2"),
    ("run bundle --question=hi", "--prompt requires", "hawk-trt run bundle --prompt hi"),
    ("run bundle -p hi --pruning-ratio 0.8", "--pruning-ratio", "--keep-ratio 0.2"),
    ("run bundle -p hi --max-length 20", "--max-length", "--max-new-tokens 20"),
    ("run bundle -p hi --fp16", "--fp16", "--dtype fp16"),
    ("run bundle -p hi --gpu", "--gpu", "--device cuda"),
    ("run bundle -p hi --stream", "--stream", "hawk-trt run bundle -p hi"),
    ("export model -o x", "--out requires", "hawk-trt export model --out x"),
    ("serve bundle --batch-size 4", "--batch-size", "--max-batch 4"),
    ("run bundle \u2014prompt hi", "--prompt requires", "hawk-trt run bundle --prompt hi"),
    ("run bundle -prompt hi", "without an option", "hawk-trt run bundle --prompt hi"),
    ("bench bundle --keep-ratio 1 0.2", "without an option", "hawk-trt bench bundle --keep-ratio 1,0.2"),
    ("serve bundle --tensor-parallel-size 2", "--tensor-parallel-size", "hawk-trt serve bundle"),
    ("--verison", "Unknown command", "hawk-trt --version"),
    ("export bundle", "--out requires", "hawk-trt run bundle --prompt"),
    ("build model", "--out requires", "hawk-trt export model --out model-bundle"),
    ("run -m bundle -p hi", "-m", "hawk-trt run --model bundle -p hi"),
    ("run bundle -p hi --KEEP-RATIO 0.3", "--KEEP-RATIO", "--keep-ratio 0.3"),
    ("run bundle bundle -p hi", "without an option", "hawk-trt run bundle -p hi"),
    ("run bundle --model bundle -p hi", "without an option", "hawk-trt run --model bundle -p hi"),
    ("run bundle -p hi -i photo.png photo.png", "without an option", "-i photo.png --image photo.png"),
    ("bench bundle --runs 3", "--runs", "--repeats 3"),
    ("run photo.png bundle hi", "--prompt requires", "hawk-trt run bundle --image photo.png --prompt hi"),
    ("run bundle -p hi --no-prune", "--no-prune", "--keep-ratio 1"),
    ("eval bundle --limit 3", "--limit", "--count 3"),
    # values
    ("run bundle -p hi --top-k 0.5", "--top-k: got 0.5, expected an integer", "hawk-trt run bundle -p hi --top-k 50"),
    ("run bundle -p hi --threads 1.5", "--threads: got 1.5, expected an integer", "hawk-trt run bundle -p hi"),
    ("run bundle -p hi --threads 1000000", "expected an integer from 1 to", "hawk-trt run bundle -p hi"),
    ("run bundle -p hi --keep-ratio 0,2", "got '0,2'", "--keep-ratio 0.2"),
    (
        "run bundle -p hi --keep-ratio 20",
        "To keep 20 %: --keep-ratio 0.2",
        "hawk-trt run bundle -p hi --keep-ratio 0.2",
    ),
    ("run bundle -p hi --max-new-tokens 1.5", "expected an integer", "hawk-trt run bundle -p hi --max-new-tokens 128"),
    ("run bundle -p hi --device gpu", "got 'gpu'", "hawk-trt run bundle -p hi --device cuda"),
    ("run bundle -p hi --dtype fp16", "bundle is float32", None),
    ("run bundle -p hi --selector hawks", '"hawks"', "--selector hawk"),
    ("export model --out x --dtype fp8", '"fp8"', "--dtype fp16"),
    ("serve bundle --port 99999", "expected 0", "hawk-trt serve bundle --port 8000"),
    ("serve bundle --host no.such.host.invalid", "cannot listen there", "hawk-trt serve bundle --host 127.0.0.1"),
    ("serve bundle --config nothing.yaml", "nothing.yaml is no file", "hawk-trt serve bundle"),
    # paths
    ("run bundel -p hi", "Did you mean bundle?", "hawk-trt run bundle -p hi"),
    ("run bundle/bundle.json -p hi", "expected the folder", "hawk-trt run bundle -p hi"),
    ("run . -p hi", "it holds", "hawk-trt run "),
    ("build graph.onnx --out x", "a file, expected a bundle or engines", "hawk-trt build BUNDLE --out x"),
    ("run damaged -p hi", "damaged (Input data was truncated). Export again: hawk-trt export CHECKPOINT", None),
    ("run empty -p hi", "no bundle there", "hawk-trt export CHECKPOINT-OR-HUB-ID --out empty"),
    ("run bundle -p hi -i phto.png", "no such file", "-i photo.png"),
    ("run bundle -p hi --video photo.png", "image, expected video", "--image photo.png"),
    ("eval bundle --dataset nothing", "got 'nothing'", "hawk-trt eval bundle --dataset tiny"),
    # the user's own line, mended
    ("run bundle --prompt-file notes.txt", "--prompt requires", "hawk-trt run bundle --prompt - < notes.txt"),
    ("run bundle --prompt-file='my notes.txt'", "--prompt requires", "run bundle --prompt - < 'my notes.txt'"),
    ("run bundle -p hi there you", "without an option", "hawk-trt run bundle -p 'hi there you'"),
    ("run bundle hi there", "--prompt requires", "hawk-trt run bundle --prompt 'hi there'"),
    ("run bundle photo.png", "--prompt requires", "run bundle --image photo.png --prompt 'What is shown here?'"),
    ("run bundle -p hi -i my photo.png", "without an option", "hawk-trt run bundle -p hi -i 'my photo.png'"),
    ("run bundle -p hi -i 'photo.png,my photo.png'", "no such file", "-i photo.png -i 'my photo.png'"),
    ("run bundle -p hi -i \"'photo.png'\"", "no such file", "hawk-trt run bundle -p hi -i photo.png"),
    ("run bundle -p hi -i 'sub\\x.png'", "no such file", "hawk-trt run bundle -p hi -i sub/x.png"),
    ("run bundle -p hi -i 'C:\\me\\x.png'", "no such file", "hawk-trt run bundle -p hi -i 'my photo.png'"),
    ("run bundle -p hi -i sub", "not a file", "hawk-trt run bundle -p hi -i sub/x.png"),
    ("run bundle -p hi --image=notes.txt", "not an image", "hawk-trt run bundle -p hi --image 'my photo.png'"),
    ("run bundle -p hi --stream=true", "--stream", "hawk-trt run bundle -p hi"),
    ("run bundle -p hi -i https://a.b/cat.jpg?x=1", "not downloaded", "&& hawk-trt run bundle -p hi -i cat.jpg"),
    ("run bundle -p hi --video notes.txt", "not a video", "hawk-trt run bundle -p hi --video VIDEO.mp4"),
    ("run bundle -p hi --fps 2", "leave it out", "hawk-trt run bundle -p hi"),
    ("run bundle -p ''", "empty text", "hawk-trt run bundle -p 'What is shown here?'"),
    ("run bundle -p hi --keep-ratio", "requires an argument", "hawk-trt run bundle -p hi --keep-ratio 0.2"),
    ("run bundle -p hi --keep_ratio -0.2", "got -0.2", "hawk-trt run bundle -p hi --keep_ratio 0.2"),
    ("run bundle -p hi --keep-ratio=1.5", "got 1.5", "hawk-trt run bundle -p hi --keep-ratio 0.015"),
    ("run bundle -p hi --max-tokens 0 --json", "got 0", "hawk-trt run bundle -p hi --max-tokens 128 --json"),
    ("run bundle -p hi --temperature hot", "unable to convert", "hawk-trt run bundle -p hi --temperature 0.7"),
    ("run bundle -p hi --device 1", "got '1'", "hawk-trt run bundle -p hi --device cuda:1"),
    ("run bundle -p hi --target onnx", '"onnx"', "hawk-trt run bundle -p hi --target cpu"),
    ("run bundle -p hi --head-weights no.json", "cannot be read", "hawk-trt run bundle -p hi"),
    ("run bundle -p hi -i photo.png --picture sub", "cannot be written", "-i photo.png --picture kept.png"),
    ("run nothing -p hi", "no such folder", "hawk-trt run CHECKPOINT-OR-HUB-ID -p hi"),
    ("export model x y", "--out requires", "hawk-trt export model --out x"),
    ("export --out x", "expected a CHECKPOINT", "hawk-trt export CHECKPOINT-OR-HUB-ID --out x"),
    ("export model --out model", "another folder", "hawk-trt export model --out model-bundle"),
    ("build bundle bundle", "--out requires", "hawk-trt build bundle --out bundle-engines"),
    ("serve bundle --port abc", "unable to convert", "hawk-trt serve bundle --port 8000"),
    (f"run {'x' * 5000} -p hi", "File name too long", "hawk-trt --help"),
    ("serve bundle --workers 4", "--workers", "hawk-trt serve bundle"),
    ("bench bundle --sides 0", "--sides: got 0", "hawk-trt bench bundle --sides 448"),
    ("doctor bundle extra", "without an option", "hawk-trt doctor bundle"),
    ("demo tiny", "without an option", "hawk-trt demo"),
    # models in each other's place
    ("run photo.png --image bundle -p hi", "an image", "hawk-trt run bundle --image photo.png -p hi"),
    (f"run https://huggingface.co/{HUB} -p hi", "a web address", f"hawk-trt run {HUB} -p hi"),
    ("run Qwen2.5-VL-3B-Instruct -p hi", "no such folder", f"hawk-trt run {HUB} -p hi"),
    ("run owner/model -p hi", "the hub cannot be reached. Download it", None),
    ("calibrate owner/model", "the hub cannot be reached. Download it", None),
    ("export bundle --out x", "exported already", "hawk-trt run bundle --prompt TEXT"),
    ("export model/config.json --out x", "expected the folder", "hawk-trt export model --out x"),
    ("build model --out x", "expected a bundle", "hawk-trt export model --out model-bundle"),
    (f"build {HUB} --out x", "expected a bundle", f"hawk-trt export {HUB} --out Qwen2.5-VL-3B-Instruct-bundle"),
    ("parity bundle --checkpoint bundle", "expected a checkpoint", "parity bundle --checkpoint CHECKPOINT-OR-HUB-ID"),
    ("RUN bundle -p hi", "Unknown command", "hawk-trt run bundle -p hi"),
    ("hawk-trt run bundle -p hi", "Unknown command", "hawk-trt run bundle -p hi"),
    ("python -m hawk_trt run bundle -p hi", "Unknown command", "hawk-trt run bundle -p hi"),
    ("run photo.png", "--prompt requires", "hawk-trt run CHECKPOINT-OR-HUB-ID --image photo.png --prompt 'What is"),
    ("run bundle -p hi -i clip.mp4", "video, expected image", "hawk-trt run bundle -p hi --video clip.mp4"),
    ("run bundle -p hi --chat-template x.jinja", "--chat-template. See", "hawk-trt run bundle -p hi"),
    ("run bundle -p hi --stop-token x", "--stop-token. See", "hawk-trt run bundle -p hi --stop x"),
    ("run bundle -p hi --gpu h100", "--gpu", "hawk-trt run bundle -p hi --device cuda"),
    ("run bundle -p hi --quiet", "--quiet", "hawk-trt run bundle -p hi"),
    ("serve bundle --quantization awq", "--quantization", "hawk-trt serve bundle"),
    ("serve bundle --generation-config auto", '"auto"', "hawk-trt serve bundle"),
    ("export model --out x --quantize", "--quantize", "hawk-trt export model --out x --dtype int8"),
    ("export model --out x --target gpu", "got 'gpu'", "hawk-trt export model --out x --target cuda"),
    ("export model --out", "--out requires", "hawk-trt export model --out model-bundle"),
    ("export model --out x --block-size 64", "only with --dtype", "hawk-trt export --help"),
    ("explain bundle -p hi -i photo.png --out", "--out requires", "-i photo.png --out kept.png"),
    ("parity bundle model", "--checkpoint requires", "hawk-trt parity bundle --checkpoint model"),
    ("parity bundle --checkpoint photo.png", "an image", "hawk-trt run MODEL --image photo.png --prompt TEXT"),
    ("chat bundle --max-tokens 0", "max_new_tokens: got 0", "hawk-trt chat bundle --max-tokens 128"),
    ("demo --count 3", "--count. See", "hawk-trt demo"),
    ("doctor nothing", "no such folder", "hawk-trt doctor BUNDLE"),
    ("doctor model", "model: a checkpoint, expected a bundle or engines", "hawk-trt export model --out model-bundle"),
    ("doctor some/where", "some/where: no such folder, or", "hawk-trt export some/where --out where-bundle"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_bundle, tiny_checkpoint):
    """A folder with a bundle, a checkpoint, a photo and an empty folder."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "bundle").symlink_to(tiny_bundle)
    (folder / "model").symlink_to(tiny_checkpoint)
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    (folder / "damaged" / "bundle.json").write_text('{"dtype": ')
    (folder / "graph.onnx").write_text("graph")
    (folder / "notes.txt").write_text("What is shown here?")
    (folder / "clip.mp4").write_bytes(b"\0\0\0\x18ftypisom")
    (folder / "sub").mkdir()
    for copy in ("photo.png", "my photo.png", "sub/x.png"):
        shutil.copy(tiny_checkpoint / "samples" / "0-colour.png", folder / copy)
    return folder


@pytest.mark.parametrize(("words", "said", "command"), MISTAKES, ids=[words for words, _, _ in MISTAKES])
def test_a_mistake_is_answered_with_a_command_that_works(words, said, command, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        code = main(shlex.split(words))
    except SystemExit as stop:
        code = stop.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert code in (1, 2)
    assert lines[0].startswith("error: ") and said in lines[0]
    assert len(lines) == (1 if command is None else 2)
    assert command is None or (lines[1].startswith(("  try: hawk-trt ", "  try: curl -LO ")) and command in lines[1])


@pytest.mark.parametrize(
    ("module", "brought"),
    [
        ("uvicorn", "'hawk-trt[serve]'"),
        ("yaml", "'hawk-trt[serve]'"),
        ("scipy.stats", "'hawk-trt[eval]'"),
        ("onnx", "'hawk-trt[export]'"),
        ("transformers", "'hawk-trt[parity]'"),
        ("left_pad", "left_pad"),
    ],
)
def test_a_missing_package_is_answered_with_the_extra_that_brings_it(module, brought, monkeypatch, capsys):
    def missing():
        raise ModuleNotFoundError(f"No module named {module!r}", name=module)

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    lines = [f"{one}; extra == '{extra}'" for extra, needed in extras.items() for one in needed]
    monkeypatch.setattr("importlib.metadata.requires", lambda _: lines)
    monkeypatch.setattr("hawk_trt.apps.cli.doctor.doctor", missing)
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert err.endswith(f": pip install {brought}\n") and err.count("\n") == 1


def test_help_and_version_can_be_asked_for_by_words(capsys):
    for words, shown in ((["help", "run"], "Usage: hawk-trt run"), (["version"], "hawk-trt "), (["help"], "chat")):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        assert shown in capsys.readouterr().out
