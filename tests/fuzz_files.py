"""Damaged files of checkpoints and bundles: each gives one clear error or works; none a traceback or a hang.

    python -m tests.fuzz_files --cases 2000 --seed 0

Each case changes one file of the tiny checkpoint, or of its bundle, as bytes or as JSON, and goes as far as an export
or a load goes before tensors are read.
"""

import argparse
import hashlib
import json
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import msgspec

from export.checkpoint import Checkpoint
from export.prompts import try_prompts
from export.writer import ExportOptions, export, up_to_date
from hawk_trt.bundle import MANIFEST, Bundle, file_entry
from hawk_trt.errors import HawkError
from hawk_trt.inputs.checkpoint_files import SMALL_FILES, read_small_files
from hawk_trt.inputs.processor import Processor
from hawk_trt.models.registry import family_by_name, family_of

TINY = Path(__file__).parent.parent / "examples" / "tiny-vlm"
_HANGS_SECONDS = 10.0
_MEMORY_BYTES = 6 << 30  # of addresses; the packages alone take two
_ODD = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**9, 10**400, 0.5, -0.0, 1e30, 1e308, 1.5e-45),
    *("", "x", "\ud83d\ude00", "<|im_end|>", "../../etc/passwd", "/etc/passwd", "a\x00b", "x" * 100_000),
    *([], {}, [[]], [None], [1, "x", None], {"content": 3}, {"default": "x"}, {"a": {"b": {"c": []}}}),
)
_JINJA = (
    "{% for %}",
    "{{ x.y.z }}",
    "{% endif %}",
    "{{ 1/0 }}",
    "{% set x = 'a' * 10 ** 9 %}",
    "{%",
    "}}",
    "{{ raise_exception('no') }}",
)


def mutated(content: bytes, name: str, rng: random.Random) -> bytes:
    """The content with one to three changes."""
    for _ in range(rng.randint(1, 3)):
        if name.endswith(".json") and rng.random() < 0.75:
            try:
                content = json.dumps(_with_odd_value(json.loads(content), rng)).encode("utf-8", "surrogatepass")
                continue
            except (ValueError, RecursionError):
                pass
        at = rng.randrange(len(content) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            content = content[:at]
        elif kind == 1 and content:
            content = content[: at - 1] + bytes([rng.randrange(256)]) + content[at:]
        elif kind == 2:
            content = content[:at] + rng.choice(_JINJA).encode() + content[at:]
        elif kind == 3:
            content = content[:at] + content[at + rng.randrange(1, 200) :]
        else:
            depth = rng.choice((10, 1000, 100_000))
            content = content[:at] + b"[" * depth + content[at:]
    return content


def _with_odd_value(value: object, rng: random.Random) -> object:
    """A JSON value in which something, at any depth, is another, gone, or under another name."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        kind = rng.random()
        if kind < 0.1:
            return {other: inner for other, inner in value.items() if other != key}
        if kind < 0.15:
            return {**value, rng.choice(("x", "", "image_processor", "chat_template", "text_config")): rng.choice(_ODD)}
        return {**value, key: _with_odd_value(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], _with_odd_value(value[at], rng), *value[at + 1 :]]
    return rng.choice(_ODD)


def try_checkpoint(folder: Path, out: Path) -> None:
    """All that an export does before it reads a tensor."""
    checkpoint = Checkpoint.open(folder)
    up_to_date(checkpoint, out, ExportOptions())
    family = family_of(checkpoint.config)
    small = read_small_files(folder, family.read_config(checkpoint.config).chat_template)
    bundle = Bundle.load(TRUE_BUNDLE)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for name, content in small.contents.items():
        (out / name).write_bytes(content)
    files = {name: file_entry(out / name) for name in small.contents}
    try_prompts(Bundle(out, replace(bundle.manifest, files=files)), family(bundle.manifest.vision))


def try_bundle(folder: Path) -> None:
    """All that a load does before it reads a tensor."""
    bundle = Bundle.load(folder)
    Processor(bundle, family_by_name(bundle.manifest.vision.family)(bundle.manifest.vision))
    bundle.embedding_table()


TRUE_BUNDLE = Path()


def main() -> int:
    """Run the cases; 1 where one ended in anything but an answer or a clear error."""
    global TRUE_BUNDLE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    rng = random.Random(args.seed)
    wrong = refused = 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        TRUE_BUNDLE = work / "bundle"
        export(TINY, TRUE_BUNDLE)
        names = [name for name in SMALL_FILES if (TINY / name).is_file()]
        for case in range(args.cases):
            folder = work / "case"
            shutil.rmtree(folder, ignore_errors=True)
            of_bundle = case % 5 == 4
            source = TRUE_BUNDLE if of_bundle else TINY
            folder.mkdir()
            for path in source.iterdir():
                if path.is_file():
                    (folder / path.name).symlink_to(path)
            name = MANIFEST if of_bundle else rng.choice([*names, "chat_template.json", "processor_config.json"])
            donor = source / ("preprocessor_config.json" if not (source / name).exists() else name)
            content = mutated(donor.read_bytes(), name, rng)
            if of_bundle:
                content = _with_its_digest(content)
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_bytes(content)
            begun = time.monotonic()
            try:
                try_bundle(folder) if of_bundle else try_checkpoint(folder, work / "out")
            except HawkError as error:
                refused += 1
                if len(str(error)) > 2000 or "\n" in str(error).strip():
                    wrong += 1
                    print(f"case {case}, {name}: an error of {len(str(error))} characters: {str(error)[:200]!r}")
            except BaseException:
                wrong += 1
                print(f"case {case}, {name}: {traceback.format_exc(limit=-4)}")
            if time.monotonic() - begun > _HANGS_SECONDS:
                wrong += 1
                print(f"case {case}, {name}: took {time.monotonic() - begun:.0f} s")
    print(f"{args.cases} cases: {refused} refused with a clear error, {wrong} wrong")
    return 1 if wrong else 0


def _with_its_digest(content: bytes) -> bytes:
    """A manifest that says its own digest, so that the change itself is read."""
    try:
        fields = msgspec.json.decode(content)
        fields.pop("manifest_sha256", None)
        return msgspec.json.encode(
            fields | {"manifest_sha256": hashlib.sha256(msgspec.json.encode(fields)).hexdigest()}
        )
    except (msgspec.MsgspecError, AttributeError, TypeError, UnicodeDecodeError, RecursionError):
        return content


if __name__ == "__main__":
    sys.exit(main())
