"""The ONNX Runtime backend: the three stages on the CPU, or on a GPU through the CUDA provider."""

import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hawk_trt.bundle import Bundle, Manifest
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import PrefillInputs
from hawk_trt.runtime.kv_cache import CachePool, KVCache
from hawk_trt.runtime.protocol import PrefillOutputs, Row, StepOutputs, Visual
from hawk_trt.runtime.session import Device, Stage, Values, download, write
from hawk_trt.runtime.versions import OPSET_24_ONNX_RUNTIME, QUANTISED_ONNX_RUNTIME, at_least
from hawk_trt.stages import (
    CUDA,
    DECODER,
    FIRST_LAYER,
    MAX_LINEAR_TOKENS,
    PORTABLE,
    STAGES,
    TENSORRT,
    VISION,
)


@dataclass(frozen=True, slots=True)
class OrtVisual:
    """What the vision stage made, by first_layer's input names.

    visual_embeds: [rows, hidden]; deepstack_embeds, where the family has them: [rows, levels, hidden].
    """

    values: Values

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(value.tensor_size_in_bytes() for value in self.values.values())

    def numpy(self) -> npt.NDArray[Any]:
        """A host copy of the embeddings."""
        return download(self.values["visual_embeds"])


class OnnxRuntimeBackend:
    """A bundle in ONNX Runtime. Make it with `load`. embedding_table: [vocab, hidden], memory-mapped."""

    name = "onnxruntime"
    max_vision_patches = 16384  # bounds the memory of a call
    max_context: int | None = None  # each request takes what it needs
    max_batch: int | None = None

    def __init__(self, bundle: Bundle, place: Device, target: str) -> None:
        entries = [bundle.manifest.graph(stage, target) for stage in STAGES]
        self.bundle = bundle
        self.device = place.kind
        self.target = target
        # prompts that are run together are padded in front, which causal attention without a mask would look at
        self.max_start = 1 if target == CUDA else None
        self.stages = {entry.stage: Stage(bundle.folder / entry.file, entry, place) for entry in entries}
        self.place = place
        self.caches = CachePool(self.stages, shared=place.kind == "cuda")
        self.embedding_table = bundle.embedding_table()

    @classmethod
    def load(cls, bundle: Bundle, device: str, target: str | None, threads: int | None = None) -> "OnnxRuntimeBackend":
        """Load the graphs of a target (None: the best for the device); threads: None takes one a core.

        Raises BackendError: the device, the dtype or the target cannot be used here; BundleError: the bundle does not
        hold the target.
        """
        manifest = bundle.manifest
        place = Device(device, threads)
        if manifest.dtype == "bfloat16" and place.kind == "cpu":
            raise BackendError(
                "dtype: got a bfloat16 bundle, which ONNX Runtime's CPU provider cannot run. "
                "Export again with --dtype float32 or float16, or load it with device='cuda'"
            )
        _check_weights(manifest)
        if target == TENSORRT:
            raise BackendError(
                "target: got tensorrt, whose graphs the engine builder takes, expected cpu, cuda or portable"
            )
        if target is None:
            best = place.kind  # a target bears its name
            old = not at_least(ort.__version__, OPSET_24_ONNX_RUNTIME[best])
            target = PORTABLE if old or (best not in manifest.targets and PORTABLE in manifest.targets) else best
        lacking = "attention" if target == CUDA else "linear attention" if manifest.language.linear is not None else ""
        runner = CUDA if target == CUDA else place.kind
        oldest = OPSET_24_ONNX_RUNTIME[runner]
        if target != PORTABLE and lacking and not at_least(ort.__version__, oldest):
            raise BackendError(
                f"target: got {target}, whose {lacking} ONNX Runtime {ort.__version__} lacks, expected {oldest} or "
                f"newer. pip install -U onnxruntime{'-gpu' if runner == CUDA else ''}, or take target portable"
            )
        return cls(bundle, place, target)

    def encode(self, feeds: Iterable[dict[str, npt.NDArray[Any]]], num_rows: int) -> OrtVisual:
        """Run the vision stage, one call a feed, into num_rows rows; one zero row where there is none."""
        if not num_rows:
            specs = [spec for spec in self.stages[FIRST_LAYER].entry.inputs if spec.shape[0] == "num_visual"]
            sizes = {spec: tuple(int(size) for size in spec.shape[1:]) for spec in specs}
            return OrtVisual({spec.name: self.place.zeros((1, *size), spec.dtype) for spec, size in sizes.items()})
        upload, stage = self.place.upload, self.stages[VISION]
        return self.join(
            [OrtVisual(stage.run({name: upload(array) for name, array in feed.items()})) for feed in feeds]
        )

    def keep(self, visual: Visual) -> OrtVisual:
        """On the CPU a copy: an output kept would hold on to all the memory that ONNX Runtime took for its run."""
        own = _own_visual(visual)
        if self.device != "cpu":
            return own
        return OrtVisual({name: self.place.upload(download(value)) for name, value in own.values.items()})

    def join(self, parts: Sequence[Visual]) -> OrtVisual:
        """The rows of all, one below the other, copied on the device; a single part is not copied."""
        own = [_own_visual(part).values for part in parts]
        if len(own) == 1:
            return OrtVisual(own[0])
        joined = {}
        for name in own[0]:
            rows = sum(part[name].shape()[0] for part in own)
            width = own[0][name].shape()[1:]
            joined[name] = self.place.empty((rows, *width), self.bundle.manifest.dtype)
            start = 0
            for part in own:
                view = self.stages[VISION].view(joined[name], start, tuple(part[name].shape()))
                write(view, part[name])
                start += int(np.prod(part[name].shape()))
        return OrtVisual(joined)

    def score(self, inputs: PrefillInputs, visual: Visual) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]. Its last layer runs on one token, and all caches are dropped."""
        batch = len(inputs.source_rows)
        cache = KVCache(self.stages, batch, 1, shared=False)
        cache.fill()
        feeds = self.prompt_feeds(inputs, visual, 1) | cache.inputs(FIRST_LAYER, 0, batch, empty=True)
        return download(self.stages[FIRST_LAYER].run(feeds, cache.outputs(FIRST_LAYER, 0, batch, 1))["scores"])

    def prefill(self, inputs: PrefillInputs, visual: Visual, columns: int, *, logits: bool) -> PrefillOutputs:
        """Run first_layer and decoder over prompts, into rows whose KV cache holds at least `columns` tokens each."""
        if self.target == CUDA and inputs.kv_start.any():
            raise BackendError(
                "kv_start: got prompts padded in front, expected none with cuda's graphs: run each alone"
            )
        started = time.perf_counter()
        cache, slots = self.caches.take(len(inputs.source_rows), columns)
        rows = [OrtRow(self.caches, cache, slot) for slot in slots]
        tensors = self.prompt_feeds(inputs, visual, inputs.num_kept_total)
        seconds = []
        for name in (FIRST_LAYER, DECODER):
            past = cache.inputs(name, slots[0], len(slots), empty=True)
            present = cache.outputs(name, slots[0], len(slots), inputs.num_kept_total)
            tensors |= self.stages[name].run(tensors | past, present)
            seconds.append(time.perf_counter() - started)
        cache.settle(slots)
        cache.add_prompt(slots, inputs.kv_start, inputs.num_kept_total, tensors)
        for number, row in enumerate(rows):
            row.hidden = (tensors["hidden_states"], number)
        return PrefillOutputs(
            rows=rows,
            step=StepOutputs(download(tensors["next_token"]), download(tensors["logits"]) if logits else None),
            kept_indices=download(tensors["kept_indices"]),
            scores=download(tensors["scores"]),
            first_layer_seconds=seconds[0],
            decoder_seconds=time.perf_counter() - started - seconds[0],
        )

    def gather(self, rows: Sequence[Row], length: int, columns: int) -> None:
        """Bring rows into one cache that has room, on the device; off a GPU also where others left: they cost time."""
        places = [_own_row(row).place for row in rows]
        cache, _ = places[0]
        together = cache.columns >= length and all(home is cache for home, _ in places)
        if together and (self.caches.shared or cache.slots == len(rows)):
            return
        cache, slots = self.caches.gather(places, columns)
        for row, slot in zip(rows, slots, strict=True):
            _own_row(row).places[:] = [(cache, slot)]

    def decode(
        self, rows: Sequence[Row], tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64], *, logits: bool
    ) -> StepOutputs:
        """Run both stages over a token of each row; BackendError: no room, not all in one cache, or a run failed."""
        places = [_own_row(row).place for row in rows]
        cache, slots = places[0][0], [slot for _, slot in places]
        if any(home is not cache for home, _ in places):
            raise BackendError("rows: got some of several KV caches, expected to gather them first")
        cache.check_room(slots)
        count = max(slots) + 1  # slots in between, of nobody or of others, run along and change nothing that counts
        of_slots = np.zeros((2, count), np.int64)
        of_slots[:, slots] = tokens, positions
        axes = self.bundle.manifest.language.position_axes
        step = cache.step(count)
        step.run(
            {
                "text_embeds": self.embedding_table[of_slots[0]],
                "position_ids": np.tile(of_slots[1][:, None], (axes, 1, 1)),
                "kv_start": cache.first_columns()[:count],
                "write_index": cache.ends[:count],
            }
        )
        cache.settle(slots)
        cache.add_tokens(slots, step.tensors)
        for row, slot in zip(rows, slots, strict=True):
            _own_row(row).hidden = (step.tensors["hidden_states"], slot)
        next_token = download(step.tensors["next_token"])[slots]
        return StepOutputs(next_token, download(step.tensors["logits"])[slots] if logits else None)

    def prompt_feeds(self, inputs: PrefillInputs, visual: Visual, num_kept_total: int) -> dict[str, ort.OrtValue]:
        """Inputs of both stages over a prompt, but for the cache."""
        linear, seq_len = self.bundle.manifest.language.linear is not None, inputs.source_rows.shape[1]
        if linear and self.target == PORTABLE and seq_len > MAX_LINEAR_TOKENS:
            raise BackendError(
                f"prompt: got {seq_len} tokens, expected at most {MAX_LINEAR_TOKENS} with portable graphs of linear "
                f"layers. Shrink the images with max_pixels, or take target {self.device}"
            )
        arrays = inputs.arrays(self.embedding_table, zero_padding=linear)
        arrays["slots"] = np.zeros(num_kept_total, np.int64)
        return {name: self.place.upload(array) for name, array in arrays.items()} | dict(_own_visual(visual).values)

    def close(self) -> None:
        """Release the sessions."""
        self.caches.close()
        self.stages.clear()


def _own_visual(visual: Visual) -> OrtVisual:
    if not isinstance(visual, OrtVisual):
        raise BackendError(f"visual: got {type(visual).__name__}, expected what this backend's encode made")
    return visual


def _check_weights(manifest: Manifest) -> None:
    """Refuse quantised weights that ONNX Runtime here has no kernel for, or would turn into floats at every step."""
    if manifest.weights is None:
        return
    weights = f"int{manifest.weights.bits}"
    if manifest.dtype == "bfloat16":
        raise BackendError(
            f"weights: got {weights} with bfloat16 activations, which ONNX Runtime cannot run. "
            f"Export again with --dtype {weights} --activations float16"
        )
    if not at_least(ort.__version__, QUANTISED_ONNX_RUNTIME):
        raise BackendError(
            f"weights: got {weights}, which ONNX Runtime {ort.__version__} cannot multiply by, "
            f"expected {QUANTISED_ONNX_RUNTIME} or newer. pip install -U onnxruntime (it needs "
            "Python 3.11), or export again with --dtype float32"
        )


class OrtRow:
    """A slot of a KV cache, which is free again when the row is released or gone; then it has no place.

    hidden: first_layer's output of the last step, and the row's number in it.
    """

    hidden: tuple[ort.OrtValue, int]

    def __init__(self, caches: CachePool, cache: KVCache, slot: int) -> None:
        self._caches, self.places = caches, [(cache, slot)]
        weakref.finalize(self, caches.give_back, self.places).atexit = False

    @property
    def place(self) -> tuple[KVCache, int]:
        """The cache and the slot; BackendError where it was released."""
        if not self.places:
            raise BackendError("row: it was released, expected one of a sequence that goes on")
        return self.places[0]

    @property
    def nbytes(self) -> int:
        """Bytes of its slot."""
        return sum(cache.row_bytes for cache, _ in self.places)

    def release(self) -> None:
        """Nobody asks for this sequence any more."""
        self._caches.give_back(self.places)

    def hidden_states(self) -> npt.NDArray[np.float32]:
        """first_layer's output of its last step: float32 [num_kept_total, hidden]."""
        tensor, number = self.hidden
        states: npt.NDArray[np.float32] = download(tensor)[number].astype(np.float32)
        return states

    def cache(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a layer's keys and values, as far as written, or of its two states."""
        cache, slot = self.place
        return cache.read(layer, slot)


def _own_row(row: Row) -> OrtRow:
    if not isinstance(row, OrtRow):
        raise BackendError(f"row: got {type(row).__name__}, expected what this backend's prefill made")
    return row
