"""The engine folder: the plans of one bundle for one GPU, and all else that the runtime needs.

    engines.json                                        this manifest, the bundle's own inside it
    vision.plan, first_layer.plan, decoder.plan         one serialized engine a stage
    embed_tokens.data                                   the token embedding table
    the plugin's .so, where a plan uses it
    config.json, tokenizer.json, chat_template.jinja, ...

In: such a folder. Out: its manifest, once nothing in it is damaged, stale or foreign, which is found out before
TensorRT sees a plan: it deserialises what it is given, or crashes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hawk_trt.bundle import ENGINES_MANIFEST, Bundle, FileEntry, Manifest, TensorEntry, check_files, read_versioned
from hawk_trt.errors import BundleError
from hawk_trt.runtime.versions import same_version

ENGINES_SCHEMA_VERSION = 5
# Optimization profiles of first_layer and decoder, by index; vision has the first alone.
PREFILL = 0
DECODE = 1
# Bytes: TensorRT takes tensors at multiples of it alone.
ALIGNMENT = 256

_PLAN_MAGIC = b"ftrt"
_PLAN_MAGIC_RTX = b"vtrt"
_PLAN_VERSION_AT = 24


@dataclass(frozen=True, slots=True)
class InputRange:
    """Shapes that one input may have in an optimization profile."""

    name: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """One .plan file; onnx_xxh3 is of the bundle's graph that it was built from.

    inputs: a cache that is written in place has its static length, and context_slots is among them.  profiles: for each
    optimization profile, the ranges of all inputs.  plugin_layers: layers that are the top-k plugin, of all `layers`
    of the network.  workarounds: names of the miscompile workarounds that were on.
    """

    stage: str
    file: str
    onnx_xxh3: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]
    profiles: tuple[tuple[InputRange, ...], ...]
    plugin_layers: int
    layers: int
    flags: tuple[str, ...]
    workarounds: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest request that the engines take.

    visual_tokens, prompt_tokens: of one prompt, before pruning.  context: tokens kept and generated, a row: the length
    of the static cache.  batch: prompts side by side.  vision_batch: tiles, or frames of one size, in a call of the
    vision stage.
    """

    visual_tokens: int
    prompt_tokens: int
    context: int
    batch: int
    vision_batch: int = 1

    @property
    def kept_tokens(self) -> int:
        """Tokens of one prompt after pruning: they all go into the cache."""
        return min(self.prompt_tokens, self.context)


@dataclass(frozen=True, slots=True)
class Machine:
    """What a plan is made for and runs on.

    tensorrt is a version such as "10.16.1.11", cuda the newest that the driver supports, such as "13.0", driver None
    where it is not told, compute_capability such as "8.7".
    """

    tensorrt: str
    cuda: str
    driver: str | None
    gpu: str
    compute_capability: str

    def __str__(self) -> str:
        sm = self.compute_capability.replace(".", "")
        return f"sm_{sm} ({self.gpu}) with TensorRT {self.tensorrt}"


@dataclass(frozen=True, slots=True)
class EngineManifest:
    """engines.json.

    bundle: its files and embedding table as they lie here, without graphs.  bundle_xxh3: of the bundle's bundle.json.
    machine: that the plans were built on, and for.  plugin: name of its file, None where no plan has a plugin layer.
    plugin_xxh3: of the plugin that the build was given, None without one.  workspace_bytes: scratch that a tactic
    could take, None where nothing limited it.  files: of the folder, without those of `bundle`.  rebuild: the command
    that makes the folder anew.
    """

    schema_version: int
    bundle: Manifest
    bundle_xxh3: str
    target: str
    limits: Limits
    machine: Machine
    plans: tuple[PlanEntry, ...]
    plugin: str | None
    plugin_xxh3: str | None
    workspace_bytes: int | None
    files: dict[str, FileEntry]
    rebuild: str
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class EngineFolder:
    """A manifest and the folder it describes."""

    folder: Path
    manifest: EngineManifest

    @classmethod
    def load(
        cls, folder: str | Path, *, verify: bool = False, progress: Callable[[int], None] | None = None
    ) -> "EngineFolder":
        """Read and check an engine folder; see read_engine_manifest and check."""
        folder = Path(folder)
        engines = cls(folder, read_engine_manifest(folder))
        engines.check(verify=verify, progress=progress)
        return engines

    @property
    def bundle(self) -> Bundle:
        """What the runtime asks a bundle for: tokenizer, settings, embedding table. It has no graphs."""
        return Bundle(self.folder, self.manifest.bundle)

    @property
    def plugin(self) -> Path | None:
        """The plugin that must be loaded before the plans, None where none is needed."""
        return None if self.manifest.plugin is None else self.folder / self.manifest.plugin

    def plan(self, stage: str) -> PlanEntry:
        return next(entry for entry in self.manifest.plans if entry.stage == stage)

    def check(self, *, verify: bool = False, progress: Callable[[int], None] | None = None) -> None:
        """Compare every file with the manifest (plans and table by size, or by hash with verify), and plan headers."""
        rebuild = f"Rebuild: {self.manifest.rebuild}"
        files = {**self.manifest.bundle.files, **self.manifest.files}
        check_files(self.folder, files, "the build", rebuild, verify=verify, progress=progress)
        for plan in self.manifest.plans:
            if plan.file not in files:
                named = f"{self.folder / ENGINES_MANIFEST}: got the plan {plan.file[:80]!r}"
                raise BundleError(f"{named}, expected one of its files. {rebuild}")
            path = self.folder / plan.file
            version, built = plan_version(path, rebuild), self.manifest.machine.tensorrt
            if not same_version(version, built):
                raise BundleError(f"{path}: written by TensorRT {version}, {ENGINES_MANIFEST} says {built}. {rebuild}")

    def check_machine(self, machine: Machine) -> None:
        """Refuse, as a BundleError, plans built for another GPU or by another TensorRT."""
        built = self.manifest.machine
        if (
            built.compute_capability != machine.compute_capability
            or built.gpu != machine.gpu
            or not same_version(built.tensorrt, machine.tensorrt)
        ):
            raise BundleError(f"{self.folder}: built for {built}, this is {machine}. Rebuild: {self.manifest.rebuild}")


def read_engine_manifest(folder: Path) -> EngineManifest:
    """Read engines.json; BundleError where there is none, a damaged one, or one of another schema."""
    absent = (
        f"{folder}: no engines there ({ENGINES_MANIFEST} is missing). "
        f"Build them from a bundle, on the GPU that is to run them: hawk-trt build BUNDLE --out {folder}"
    )
    path, again = folder / ENGINES_MANIFEST, "Build again: hawk-trt build BUNDLE --out FOLDER"
    return read_versioned(path, EngineManifest, ENGINES_SCHEMA_VERSION, absent, "the build", again)


def plan_version(path: Path, advice: str) -> str:
    """The TensorRT version that wrote a plan, such as "10.3.0.26"; BundleError where it is none of TensorRT's plans."""
    with path.open("rb") as file:
        header = file.read(_PLAN_VERSION_AT + 4)
    if header[:4] == _PLAN_MAGIC_RTX:
        raise BundleError(f"{path}: a plan of TensorRT-RTX, expected one of TensorRT. {advice}")
    if header[:4] != _PLAN_MAGIC or len(header) < _PLAN_VERSION_AT + 4:
        raise BundleError(f"{path}: not a TensorRT plan (begins with {header[:4]!r}). {advice}")
    return ".".join(str(part) for part in header[_PLAN_VERSION_AT:])
