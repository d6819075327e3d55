"""Damaged files of checkpoints and bundles: each gives one clear error or works; none a traceback or a hang.

    PYTHONPATH=tests python -m tests.fuzz_files --cases 2000 --seed 0

Each case changes one file of the tiny checkpoint, of its bundle or of its engine folder, as bytes or as JSON (of a
safetensors file, the header), and goes as far as an export or a load goes before tensors are read.
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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from benchmarks.memory_growth import resident_mb
from export.architectures import read_config
from export.checkpoint import Checkpoint
from export.checkpoint_files import SMALL_FILES, read_small_files
from export.prompts import try_prompts
from export.writer import ExportOptions, export, up_to_date
from hawk_trt.bundle import ENGINES_MANIFEST, MANIFEST, Bundle, file_entry
from hawk_trt.engine_folder import EngineFolder
from hawk_trt.errors import HawkError
from hawk_trt.inputs.processor import Processor
from hawk_trt.models import load_family
from trt_machine import engine_folder

TINY = Path(__file__).parent.parent / "examples" / "tiny-vlm"
_HANGS_SECONDS = 10.0
_RESIDENT_MIB = 2048
_ADDRESS_BYTES = 6 << 30  # the packages alone take two GB of addresses
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
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


@dataclass
class Source:
    """A whole folder, its files that are damaged in turn, and what reads it."""

    folder: Path
    names: tuple[str, ...]
    attempt: Callable[[Path], None]

    def damaged(self, name: str, rng: random.Random) -> bytes:
        """One of its files, changed."""
        donor = self.folder / name
        content = (donor if donor.exists() else self.folder / "preprocessor_config.json").read_bytes()
        if name.endswith(".safetensors"):
            return _with_damaged_header(content, rng)
        changed = mutated(content, name, rng)
        return _with_its_digest(changed) if name in (MANIFEST, ENGINES_MANIFEST) else changed


def sources(work: Path) -> list[Source]:
    """The checkpoint in one file and in shards, its bundle, and its engines as a stand-in of TensorRT builds them."""
    bundle = work / "bundle"
    export(TINY, bundle)
    engines = engine_folder(bundle, work / "engines", "tensorrt")
    sharded = work / "sharded"
    shutil.copytree(TINY, sharded)
    shard = "model-00001-of-00001.safetensors"
    header, _ = _header((sharded / _WEIGHTS).rename(sharded / shard).read_bytes())
    names = [name for name in json.loads(header) if name != "__metadata__"]
    (sharded / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    small = [name for name in SMALL_FILES if (TINY / name).is_file()]

    def try_checkpoint(folder: Path) -> None:
        """All that an export does before it reads a tensor."""
        out = work / "out"
        checkpoint = Checkpoint.open(folder)
        up_to_date(checkpoint, out, ExportOptions())
        read = read_small_files(folder, read_config(checkpoint.config).chat_template)
        whole = Bundle.load(bundle)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name, content in read.contents.items():
            (out / name).write_bytes(content)
        files = {name: file_entry(out / name) for name in read.contents}
        try_prompts(Bundle(out, replace(whole.manifest, files=files)), load_family(whole.manifest.vision))

    return [
        Source(TINY, (*small, "chat_template.json", "processor_config.json"), try_checkpoint),
        Source(TINY, (_WEIGHTS,), try_checkpoint),
        Source(sharded, (_INDEX,), try_checkpoint),
        Source(bundle, (MANIFEST,), lambda folder: _try_bundle(Bundle.load(folder))),
        Source(engines, (ENGINES_MANIFEST,), lambda folder: _try_bundle(EngineFolder.load(folder).bundle)),
    ]


def _try_bundle(bundle: Bundle) -> None:
    """What a load does between the manifest and the tensors."""
    Processor(bundle, load_family(bundle.manifest.vision))
    bundle.embedding_table()


def fault(source: Source, folder: Path) -> tuple[bool, str | None]:
    """Whether a damaged folder was refused, and what was wrong with that if anything."""
    begun, refused, wrong = time.process_time(), False, None  # a busy machine stretches other clocks
    try:
        source.attempt(folder)
    except HawkError as error:
        refused = True
        if len(str(error)) > 2000 or "\n" in str(error).strip():
            wrong = f"an error of {len(str(error))} characters: {str(error)[:200]!r}"
    except BaseException:
        wrong = traceback.format_exc(limit=-4)
    if (seconds := time.process_time() - begun) > _HANGS_SECONDS:
        wrong = f"took {seconds:.0f} s"
    # not getrusage's: there a process begins with the peak of the one that started it
    if (mib := resident_mb("VmHWM")) > _RESIDENT_MIB:
        wrong = f"took {mib:.0f} MiB"
    return refused, wrong


def main() -> int:
    """Run the cases; 1 where one ended in anything but an answer or a clear error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    rng = random.Random(args.seed)
    refusals = faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        kinds = sources(work)
        folder = work / "case"
        for case in range(args.cases):
            source = kinds[rng.choices(range(len(kinds)), (6, 1, 1, 1, 1))[0]]
            name = rng.choice(source.names)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for path in source.folder.iterdir():
                if path.is_file() and path.name != name:
                    (folder / path.name).symlink_to(path)
            (folder / name).write_bytes(source.damaged(name, rng))
            refused, wrong = fault(source, folder)
            refusals += refused
            if wrong is not None:
                faults += 1
                print(f"case {case}, {name}: {wrong}", flush=True)
    print(f"{args.cases} cases: {refusals} refused with a clear error, {faults} wrong")
    return 1 if faults else 0


def _header(content: bytes) -> tuple[bytes, bytes]:
    """The header and the tensors of a safetensors file."""
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def _with_damaged_header(content: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header is another; its length is true more often than not."""
    header, tensors = _header(content)
    header = mutated(header, "header.json", rng)
    length = len(header) if rng.random() < 0.8 else rng.choice((0, 1, 1 << 20, 1 << 40, (1 << 64) - 1))
    return length.to_bytes(8, "little") + header + tensors


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
