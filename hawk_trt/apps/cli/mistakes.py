"""What was probably meant: the command line that would have worked.

In: the words of a command line, and the error that they led to. Out: a command line to try.
"""

import re
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from cyclopts import CycloptsError
from cyclopts.exceptions import (
    CoercionError,
    MissingArgumentError,
    UnknownCommandError,
    UnknownOptionError,
    UnusedCliTokensError,
)

from hawk_trt.errors import HawkError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".avif")
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
_SUGGESTED = re.compile(r'Did you mean "?([^\s"?]+)"?\?')
# What others call our commands and options.
SYNONYMS = {
    "run": "ask answer generate infer inference predict query",
    "serve": "server start api launch up web",
    "export": "convert onnx import download pull quantize",
    "build": "compile engine engines trt tensorrt trtexec",
    "explain": "visualize visualise show draw picture plot",
    "parity": "compare diff validate verify",
    "eval": "evaluate evaluation accuracy score test",
    "bench": "benchmark perf profile speed measure",
    "calibrate": "calibration heads head-weights",
    "advise": "advice recommend tune suggest",
    "doctor": "check info env status diagnose list gpus",
}
_OTHERS = {
    "--max-new-tokens": ("--max-length", "--max-output-tokens", "--num-predict", "--n-predict", "--num-tokens", "-n"),
    "--prompt": ("--question", "--text", "--message", "--instruction", "--query", "-q", "-t"),
    "--image": ("--img", "--images", "--picture", "--photo", "--image-path", "--input", "--file", "-f"),
    "--keep-ratio": ("--keep", "--ratio", "--retention-ratio", "--keep-rate", "--token-ratio", "-k", "-r"),
    "--out": ("--output", "--output-dir", "--out-dir", "--save-dir", "--save", "--dest", "--target-dir", "-d"),
    "--model": ("--model-path", "--model-id", "--bundle", "--engine", "--engines", "--path", "--input", "--checkpoint"),
    "--checkpoint": ("--ckpt", "--model-path", "--reference", "--hf-model"),
    "--dtype": ("--precision", "--torch-dtype", "--quantization", "--quantize", "--type"),
    "--device": ("--backend", "--provider", "--accelerator"),
    "--temperature": ("--temp",),
    "--host": ("--listen", "--bind", "--address", "--ip"),
    "--api-key": ("--key", "--token", "--auth"),
    "--max-batch": ("--batch-size", "--max-num-seqs", "--batch"),
    "--target": ("--provider", "--runtime", "--format"),
    "--device cuda": ("--gpu", "--cuda", "--use-gpu"),
    "--device cpu": ("--cpu", "--no-gpu"),
    "--dtype fp16": ("--fp16", "--half"),
    "--dtype bf16": ("--bf16",),
    "--dtype int8": ("--int8", "--load-in-8bit"),
    "--dtype int4": ("--int4", "--load-in-4bit"),
}


class WrongModel(HawkError):
    """A name stands for something else than a command takes.

    Attributes:
        named: the word of the command line.
        instead: the word in its place that would do; empty where that is not known.
        command: another command that would do.
    """

    def __init__(self, message: str, named: str = "", instead: str = "", *, command: str = "") -> None:
        super().__init__(message)
        self.named, self.instead, self.command = named, instead, command


def to_try(error: Exception, program: str, words: Sequence[str]) -> str | None:
    """A command line in the place of the one that led to an error, None where none is known."""
    if isinstance(error, WrongModel):
        if error.command:
            return error.command
        meant = _replaced(words, error.named, error.instead) if error.instead else None
    elif isinstance(error, CycloptsError):
        meant = _meant(error, words)
        if meant is None and error.target:
            example = re.search(r"^\s*Example: (.+)$", error.target.__doc__ or "", re.MULTILINE)
            return example[1] if example else None
    else:
        meant = None
    return shlex.join([program, *meant]) if meant else None


def _meant(error: CycloptsError, words: Sequence[str]) -> Sequence[str] | None:
    text, unused = str(error), error.unused_tokens or []
    suggested = _SUGGESTED.search(text)
    if isinstance(error, UnknownCommandError):
        if suggested:
            return _replaced(words, unused[0], suggested[1])
        return ["run", *words] if Path(unused[0]).exists() or "/" in unused[0] else None
    if isinstance(error, UnknownOptionError):
        flag = (error.token.keyword or error.token.value).partition("=")[0]
        known = [name for argument in error.argument_collection for name in argument.names]
        return _with_flag(words, flag, known, suggested[1] if suggested else None)
    if isinstance(error, CoercionError) and suggested and error.token:
        return _replaced(words, error.token.value, suggested[1])
    if isinstance(error, MissingArgumentError | UnusedCliTokensError):
        assert error.app is not None
        known = [name for argument in error.app.assemble_argument_collection() for name in argument.names]
        for word in unused:
            if word.startswith("-") and word.partition("=")[0] not in known:
                return _with_flag(words, word.partition("=")[0], known, None)
        loose = [word for word in unused if not word.startswith("-")]
        if loose:
            return _with_names(words, loose, known)
        if isinstance(error, MissingArgumentError) and error.argument and not error.argument.tokens:
            return _with_value(words, error.argument.names[0])
    return None


def _with_flag(words: Sequence[str], wrong: str, known: Sequence[str], suggested: str | None) -> Sequence[str] | None:
    """The words with one flag replaced: by what another program's flag is called here, or by one that looks like it."""
    if wrong in ("--pruning-ratio", "--prune-ratio", "--drop-ratio", "--sparsity") and "--keep-ratio" in known:
        try:
            return _with_pruning_ratio(words, wrong)
        except (ValueError, IndexError):
            return None
    right = next((flag for flag, others in _OTHERS.items() if wrong in others and flag.split()[0] in known), suggested)
    if right is None:
        close = get_close_matches(wrong, known, n=1)
        right = close[0] if close else None
    return _replaced(words, wrong, right) if right else None


def _with_pruning_ratio(words: Sequence[str], wrong: str) -> Sequence[str]:
    """The share that others drop is the rest of the one that is kept here."""
    place = next(place for place, word in enumerate(words) if word.partition("=")[0] == wrong)
    _, joined, value = words[place].partition("=")
    rest = words[place + 1 :] if joined else words[place + 2 :]
    share = 1 - float(value if joined else words[place + 1])
    return [*words[:place], "--keep-ratio", f"{share:.3g}", *rest]


def _with_names(words: Sequence[str], loose: Sequence[str], known: Sequence[str]) -> Sequence[str] | None:
    """The words with a flag before each value that stands alone: --image before an image, --prompt before a text."""
    meant = list(words)
    for word in loose:
        suffix = Path(word).suffix.lower()
        flag = "--image" if suffix in IMAGES else "--video" if suffix in VIDEOS else "--prompt"
        if flag == "--prompt" and "--out" in known and "--prompt" not in known:
            flag = "--out"
        if flag not in known or (flag in ("--prompt", "--out") and flag in meant):
            return None
        meant.insert(meant.index(word), flag)
    return meant


def _with_value(words: Sequence[str], name: str) -> Sequence[str] | None:
    """The words with the argument that is missing."""
    model = next((word for word in words[1:] if not word.startswith("-")), "model")
    made = f"{Path(model).name}-{'engines' if words[:1] == ['build'] else 'bundle'}"
    values = {"--prompt": "What is shown here?", "--out": made, "--checkpoint": "CHECKPOINT-OR-HUB-ID"}
    if name == "--model":
        return [*words[:1], "CHECKPOINT-OR-HUB-ID", *words[1:]]
    return [*words, name, values[name]] if name in values else None


def _replaced(words: Sequence[str], wrong: str, right: str) -> Sequence[str]:
    """The words with one of them replaced, also where it is the part before or after an equals sign."""
    meant: list[str] = []
    for word in words:
        name, joined, value = word.partition("=")
        if word == wrong or Path(word) == Path(wrong):
            meant += right.split()
        elif joined and name == wrong:
            meant += [*right.split(), value] if " " not in right else right.split()
        elif joined and value == wrong:
            meant.append(f"{name}={right}")
        else:
            meant.append(word)
    return meant
