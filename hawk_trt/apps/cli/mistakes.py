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

from hawk_trt.apps.cli.vocabulary import (
    ALIASES,
    FOREIGN,
    IMAGES,
    LISTS,
    NEEDLESS,
    OPTIONS,
    OURSELVES,
    OUT,
    SYNONYMS,
    VALUES,
    VIDEOS,
    WORKING,
)
from hawk_trt.errors import HawkError

MANIFESTS = ("bundle.json", "engines.json", "config.json")
_NEAR = 0.76  # of two spellings, from 0 to 1: below are options that have little to do with each other
_SUGGESTED = re.compile(r'Did you mean "?([^\s"?]+)"?\?')


class WrongModel(HawkError):
    """A name stands for something else than a command takes.

    named is the word of the command line, instead the one in its place that would do, where that is known; command is
    another command that would do.
    """

    def __init__(self, message: str, named: str = "", instead: str = "", *, command: str = "") -> None:
        super().__init__(message)
        self.named, self.instead, self.command = named, instead, command


def to_try(error: Exception, program: str, words: Sequence[str]) -> str | None:
    """A command line in the place of the one that led to an error; None where the error names one itself.

    program: hawk-trt, or python -m and a module. words: of the command line, after the program.
    """
    # A flag and its value are two words from here on. What takes none here loses it.
    alone = {*NEEDLESS, *(name for flag, names in OPTIONS.items() if " " in flag for name in names.split())}
    pairs = [word.split("=", 1) if word.startswith("-") else [word] for word in words]
    try:
        return _to_try(error, program, [part for pair in pairs for part in pair[: 1 if pair[0] in alone else 2]])
    except (OSError, ValueError):  # a word that no path can have, or a folder that cannot be read
        return f"{program} --help"


def _to_try(error: Exception, program: str, words: Sequence[str]) -> str | None:
    known = words and words[0] in SYNONYMS and " " not in program
    command = f"{program} {words[0]}" if known else program
    if isinstance(error, WrongModel):
        model = next((word for word in words if any((Path(word) / file).is_file() for file in MANIFESTS)), None)
        has_image = any(ALIASES.get(word, word) == "--image" for word in words)
        if model and has_image and Path(error.named).suffix.lower() in IMAGES:  # swapped
            swap = {model: error.named, error.named: model}
            return f"{program} {shlex.join(swap.get(word, word) for word in words)}"
        if error.command:
            return error.command
        named = next((word for word in words if ALIASES.get(word, word) == error.named), error.named)
        meant = _replaced(words, named, [error.instead]) if error.instead else None
        if meant and meant[1:2] == [error.instead] and error.instead in meant[2:]:  # a model and its checkpoint
            meant = [*words[:2], *meant[2:]]
    elif isinstance(error, CycloptsError):
        meant = _meant(error, words)
        if meant is None and "expected a CHECKPOINT" in str(error):
            meant = [words[0], "CHECKPOINT-OR-HUB-ID", *words[1:]]
        meant = meant or _with_working_value(str(error), words)
        if meant is None and error.target:
            example = re.search(r"^\s*Example: (.+)$", error.target.__doc__ or "", re.MULTILINE)
            return example[1] if example else None
    elif address := next((word for word in words if f"{word}: URLs are not downloaded" in str(error)), None):
        file = Path(address.partition("?")[0]).name
        return f"curl -LO {shlex.quote(address)} && {program} {shlex.join(_replaced(words, address, [file]))}"
    else:
        meant = _with_other_value(str(error), words)
        names_a_command = re.search(r"hawk-trt \w|pip install|make \w|hf \w", str(error))
        if meant is None and names_a_command:
            return None
        meant = meant or _with_working_value(str(error), words)
    if not meant or list(meant) == list(words):
        return f"{command} --help"
    text_file = next((word for word in meant if word.startswith("< ") and word not in words), None)
    line = f"{program} {shlex.join(word for word in meant if word != text_file)}"
    return line if text_file is None else f"{line} < {shlex.quote(text_file[2:])}"


def _with_other_value(message: str, words: Sequence[str]) -> Sequence[str] | None:
    """The words with the one that a message complains of replaced by what was probably meant: a value, or files."""
    for place, word in enumerate(words):
        spellings = {word, str(Path(word).expanduser()), word.removeprefix("file://")}
        if place and word and not word.startswith("-") and any(one in message for one in spellings):
            if word in VALUES and VALUES[word] in message:
                return _replaced(words, word, [VALUES[word]])
            flag = words[place - 1]
            files = _files_meant(word, is_image=ALIASES.get(flag, flag) == "--image")
            if files:
                return _replaced(words, word, [files[0], *(part for file in files[1:] for part in (flag, file))])
    return None


def _files_meant(word: str, *, is_image: bool) -> list[str]:
    """The file that a path was probably meant for, or several that were written as one."""
    path = Path(word)
    listed = [part.strip("'\" ") for part in word.split(",")]
    if listed != [word] and all(Path(part).is_file() for part in listed):  # with quotes in quotes, or commas
        return listed
    if "\\" in word and Path(word.replace("\\", "/")).exists():
        return [word.replace("\\", "/")]
    if not path.exists() and path.parent.is_dir():
        names = [other.name for other in path.parent.iterdir()]
        if close := get_close_matches(path.name, names, n=1, cutoff=0.7):
            return [str(path.parent / close[0])]
    if not is_image or path.suffix.lower() in VIDEOS:
        return []
    folder = next(place for place in (path, path.parent, Path()) if place.is_dir())
    return sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in IMAGES)[:1]


def _with_working_value(message: str, words: Sequence[str]) -> Sequence[str] | None:
    """The words with a value that works for the option that a message names, or whose value it names."""
    if "Add --image" in message:
        return [*words, "--image", *(_files_meant("IMAGE.png", is_image=True) or ["IMAGE.png"])]
    head = re.match(r"(\w+):", message)
    named = {*re.findall(r"--[a-z][\w-]*", message), *([f"--{head[1].replace('_', '-')}"] if head else ())}
    for place, flag in enumerate(words):
        option = ALIASES.get(flag, flag).replace("_", "-")
        follows = place + 1 < len(words) and not re.match(r"-\D", words[place + 1])
        value = words[place + 1] if follows else ""
        if not flag.startswith("-") or not ({flag, option} & named or (value and f"{value}:" in message)):
            continue
        if follows and "requires an argument" in message:  # the same option again, without one
            continue
        working = "" if "eave it out" in message else _working_value(words[0], option, value)
        return [*words[:place], *([flag, working] if working else ()), *words[place + 1 + follows :]]
    return None


def _working_value(command: str, option: str, value: str) -> str:
    """A value of an option that is near to the one that was given; nothing for options that need not be given."""
    if option == "--keep-ratio" and re.fullmatch(r"\d+(\.\d+)?", value) and 1 < float(value) <= 100:
        return f"{float(value) / 100:g}"
    if option == "--device" and value.isdigit():
        return f"cuda:{value}"
    if option == "--out":
        return OUT.get(command) or f"{Path(value).stem or 'model'}-bundle"
    return WORKING.get(option, "")


def _meant(error: CycloptsError, words: Sequence[str]) -> Sequence[str] | None:
    unused = error.unused_tokens or []
    found = _SUGGESTED.search(str(error))
    suggested = found[1] if found else None
    with_dashes = [re.sub(r"^[-\u2013\u2014]*[\u2013\u2014]-*", "--", word) for word in words]
    if with_dashes != list(words):  # as text programs turn them into one long one
        return with_dashes
    if isinstance(error, UnknownCommandError):
        first = next((place for place, word in enumerate(words) if word not in OURSELVES), 0)
        if first and words[first] in SYNONYMS:
            return words[first:]
        if unused[0].lower() in SYNONYMS:
            return _replaced(words, unused[0], [unused[0].lower()])
        named = next((word for word in words if word in SYNONYMS), None)
        if named:  # after options, which follow it
            return [named, *(word for word in words if word != named)]
        if suggested:
            return _replaced(words, unused[0], [suggested])
        begin = unused[0]
        if close := get_close_matches(begin, ("--help", "--version", "--install-completion"), n=1):
            return close
        return ["run", *words] if begin.startswith("--") or "/" in begin or Path(begin).exists() else None
    if isinstance(error, UnknownOptionError):
        known = [name for argument in error.argument_collection for name in argument.names]
        return _with_flag(words, (error.token.keyword or error.token.value).partition("=")[0], known)
    if isinstance(error, CoercionError) and error.token:
        value = error.token.value
        decimal = re.fullmatch(r"(\d*),(\d+)", value)  # as some languages write it, unless it is a list
        others = [VALUES[value]] if VALUES.get(value) in re.findall(r"\w+", str(error)) else []
        others += [suggested] if suggested else []
        right = others[0] if others else f"{decimal[1]}.{decimal[2]}" if decimal else None
        return _replaced(words, value, [right]) if right else None
    if isinstance(error, MissingArgumentError | UnusedCliTokensError):
        assert error.app is not None
        if isinstance(error, MissingArgumentError) and error.argument and words[-1] in error.argument.names:
            return None  # the last option has no value
        known = [name for argument in error.app.assemble_argument_collection() for name in argument.names]
        for word in unused:
            if word.startswith("-") and word.partition("=")[0] not in known:
                return _with_flag(words, word.partition("=")[0], known)
        loose = [word for word in unused if not word.startswith("-")]
        if loose:
            missing = error.argument.names[0] if isinstance(error, MissingArgumentError) and error.argument else ""
            return _with_names(words, loose, known, missing)
        if isinstance(error, MissingArgumentError) and error.argument and not error.argument.tokens:
            return _with_value(words, error.argument.names[0])
    return None


def near(wrong: str, known: Sequence[str]) -> str | None:
    """The option that was probably meant: one that is spelled much like another, or begins or ends it."""
    bare, stem = {name.lstrip("-"): name for name in known}, wrong.lstrip("-").replace("_", "-").lower()
    found = get_close_matches(stem, bare, n=1, cutoff=_NEAR)
    found += [name for name in bare if len(name) > 2 and (stem.startswith(f"{name}-") or name.endswith(f"-{stem}"))]
    return bare[found[0]] if found else None


def _with_flag(words: Sequence[str], wrong: str, known: Sequence[str]) -> Sequence[str] | None:
    """The words with one flag replaced: by what another program's flag is called here, or by one that looks like it."""
    if wrong not in words:
        return None
    place = words.index(wrong)
    follows = place + 1 < len(words) and not words[place + 1].startswith("-")
    before, value, rest = words[:place], words[place + 1] if follows else "", words[place + 1 + follows :]
    if wrong in ("--pruning-ratio", "--prune-ratio", "--drop-ratio", "--sparsity") and "--keep-ratio" in known:
        try:  # the share that others drop is the rest of the one that is kept here
            return [*before, "--keep-ratio", f"{1 - float(value):.3g}", *rest]
        except ValueError:
            return None
    if wrong in NEEDLESS:
        return [word for word in words if word != wrong]
    if wrong in FOREIGN.split():
        return [*before, *rest]
    if wrong in ("--prompt-file", "--question-file", "--text-file") and "--prompt" in known:
        return [*before, "--prompt", "-", *rest, f"< {value or 'FILE'}"]
    if words[0] == "chat" and wrong in ("--prompt", "-p"):
        return ["run", *words[1:]]
    named = [flag for flag, others in OPTIONS.items() if wrong in others.split() and flag.split()[0] in known]
    right = named[0] if named else near(wrong, known)
    if right is None:  # there is no such option, and nothing like it
        return [*before, *rest]
    if " " in right and "/" not in value and not Path(value).exists():  # the value went with the other flag
        return [*before, *right.split(), *rest]
    return _replaced(words, wrong, [*right.split(), *([WORKING[right]] if not value and right in WORKING else ())])


def _with_names(words: Sequence[str], loose: Sequence[str], known: Sequence[str], missing: str) -> Sequence[str]:
    """The words with a flag before each value that stands alone: --image before an image, --prompt before a text."""
    for place, word in enumerate(words):
        if word in loose and Path(f"{words[place - 1]} {word}").is_file():  # a path with spaces
            return [*words[: place - 1], f"{words[place - 1]} {word}", *words[place + 1 :]]
    meant = list(words)
    texts = [word for word in loose if not Path(word).exists() and not Path(word).suffix and not word.isdigit()]
    if len(texts) > 1 and texts == loose and "--prompt" in known and meant[-len(texts) :] == texts:  # without quotes
        meant[-len(texts) :] = loose = [" ".join(texts)]
    is_model = any((Path(loose[0]) / file).is_file() for file in MANIFESTS)
    if is_model and len(words) > 1 and "--image" in known and Path(words[1]).suffix.lower() in IMAGES:  # swapped
        at = words.index(loose[0])
        meant = [words[0], loose[0], "--image", words[1], *words[2:at], *words[at + 1 :]]
        loose = loose[1:]
    if words[0] == "chat":
        meant, known = ["run", *words[1:]], [*known, "--prompt"]
    for word in loose:
        # of two alike, the one behind a flag is its value
        alike = [place for place, other in enumerate(meant) if other == word]
        place = next((place for place in alike if meant[place - 1] not in known), alike[0])
        before, suffix = meant[place - 1], Path(word).suffix.lower()
        if f"-{before}" in known:  # an option with one dash
            meant[place - 1] = f"-{before}"
            continue
        if meant[place - 2] in LISTS and words[0] != "run":
            meant[place - 1 : place + 1] = [f"{before},{word}"]
            continue
        if place >= 2 and before in known:  # a flag was taken for the value of the one before it
            meant.insert(place - 1, WORKING["--prompt"])
            continue
        flag = "--image" if suffix in IMAGES else "--video" if suffix in VIDEOS else "--prompt"
        if missing == "--checkpoint" and (Path(word) / MANIFESTS[-1]).is_file():
            flag = missing
        if words[0] in ("export", "build"):
            flag = "--out"
        elif words[0] == "serve" and word.isdigit():
            flag = "--port"
        if any((Path(word) / file).is_file() for file in MANIFESTS) and (words.count(word) > 1 or "--model" in words):
            meant.pop(place)  # the model is named twice
            if words[0] in ("export", "build"):
                meant += ["--out", f"{Path(word).name}-{'engines' if words[0] == 'build' else 'bundle'}"]
            continue
        if meant[place - 2] in ("-p", "--prompt") and flag == "--prompt":  # a text without quotes
            meant[place - 1 : place + 1] = [f"{before} {word}"]
        elif flag not in known or (flag in ("--prompt", "--out") and {flag, flag[1:3]} & set(meant)):
            meant.pop(place)
        else:
            meant.insert(place, flag)
    if missing == "--prompt" and not {"-p", "--prompt"} & set(meant):
        meant += ["--prompt", WORKING["--prompt"]]
    return meant


def _with_value(words: Sequence[str], name: str) -> Sequence[str] | None:
    """The words with the argument that is missing."""
    given = next((word for word in words[1:] if not word.startswith("-")), None)
    model = given or "model"
    kinds = [file for file in MANIFESTS if (Path(model) / file).is_file()]
    if name == "--out" and words[0] == "export" and kinds and kinds[0] != "config.json":
        return ["run", model, "--prompt", WORKING["--prompt"]]
    if name == "--out" and words[0] == "build" and (kinds == ["config.json"] or not Path(model).exists()):
        return ["export", given or "CHECKPOINT-OR-HUB-ID", "--out", f"{Path(model).name}-bundle"]
    if name == "--out" and given is None:
        words = [*words, "CHECKPOINT-OR-HUB-ID"]
    made = f"{Path(model).name}-{'engines' if words[:1] == ['build'] else 'bundle'}"
    values = WORKING | {"--out": made}
    if name == "--prompt" and Path(model).suffix.lower() in IMAGES:
        return [*_replaced(words, model, ["CHECKPOINT-OR-HUB-ID", "--image", model]), name, values[name]]
    if name == "--model":
        return [*words[:1], "CHECKPOINT-OR-HUB-ID", *words[1:]]
    return [*words, name, values[name]] if name in values else None


def _replaced(words: Sequence[str], wrong: str, right: Sequence[str]) -> Sequence[str]:
    """The words with one of them replaced, which may be a path in another spelling."""
    meant: list[str] = []
    for word in words:
        meant += right if word == wrong or (wrong and Path(word) == Path(wrong)) else [word]
    return meant
