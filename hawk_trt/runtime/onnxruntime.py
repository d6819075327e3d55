"""The ONNX Runtime backend: the three stages on the CPU, or on a GPU through the CUDA provider."""

import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hawk_trt.bundle import Bundle, Manifest
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import PrefillInputs
from hawk_trt.runtime.cache_pool import CachePool
from hawk_trt.runtime.kv_cache import KVCache
from hawk_trt.runtime.protocol import DecodeInputs, Generation, PrefillOutputs, StepOutputs, Visual
from hawk_trt.runtime.session import Device, Stage, download, write
from hawk_trt.runtime.versions import OPSET_24_ONNX_RUNTIME, QUANTISED_ONNX_RUNTIME, at_least
from hawk_trt.stages import CUDA, DECODER, FIRST_LAYER, PORTABLE, STAGES, TENSORRT, VISION, in_place


class OrtVisual:
    """What the vision stage made, by first_layer's input names.

    visual_embeds: [rows, hidden]; deepstack_embeds, where the family has them: [rows, levels, hidden].
    """

    def __init__(self, values: Mapping[str, ort.OrtValue]) -> None:
        self.values = values

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(value.tensor_size_in_bytes() for value in self.values.values())

    def numpy(self) -> npt.NDArray[Any]:
        """A host copy of the embeddings."""
        return download(self.values["visual_embeds"])


class OnnxRuntimeBackend:
    """A bundle in ONNX Runtime. Make it with `load`.

    Attributes:
        bundle: what was loaded.
        stages: its graphs by stage name.
        place: where they compute.
        caches: KV caches of its generations.
        embedding_table: [vocab, hidden], memory-mapped.
    """

    name = "onnxruntime"
    max_vision_patches = 16384  # bounds the memory of a call
    max_context: int | None = None  # each request takes what it needs
    max_batch: int | None = None
    can_gather = True

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

        Raises:
            BackendError: the device, the dtype or the target cannot be used here.
            BundleError: the bundle does not hold the target.
        """
        manifest = bundle.manifest
        place = Device(device, threads)
        if manifest.dtype == "bfloat16" and place.kind == "cpu":
            raise BackendError(
                "dtype: got a bfloat16 bundle, which ONNX Runtime's CPU provider cannot run. "
                "Export again with --dtype float32 or float16, or load it with device='cuda'"
            )
        _check_weights(manifest)
        oldest = OPSET_24_ONNX_RUNTIME[place.kind]
        if manifest.language.linear is not None and not at_least(ort.__version__, oldest):
            raise BackendError(
                f"layers: got linear attention, which ONNX Runtime {ort.__version__} lacks on this device, expected "
                f"{oldest} or newer. pip install -U {'onnxruntime-gpu' if place.kind == 'cuda' else 'onnxruntime'}"
            )
        if target == TENSORRT:
            raise BackendError(
                "target: got tensorrt, whose graphs the engine builder takes, expected cpu, cuda or portable"
            )
        if target is None:
            best = place.kind  # a target bears its name
            old = not at_least(ort.__version__, OPSET_24_ONNX_RUNTIME[best])
            target = PORTABLE if old or (best not in manifest.targets and PORTABLE in manifest.targets) else best
        elif target == CUDA and not at_least(ort.__version__, OPSET_24_ONNX_RUNTIME[CUDA]):
            raise BackendError(
                f"target: got cuda, whose attention ONNX Runtime {ort.__version__} lacks, expected "
                f"{OPSET_24_ONNX_RUNTIME[CUDA]} or newer. pip install -U onnxruntime-gpu, or take target portable"
            )
        return cls(bundle, place, target)

    def encode(self, feeds: Iterable[dict[str, npt.NDArray[Any]]], num_rows: int) -> OrtVisual:
        """Run the vision stage, one call a feed, into num_rows rows; one zero row where there is none."""
        if not num_rows:
            return self._no_visual()
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

    def _no_visual(self) -> OrtVisual:
        """One zero row, as a prompt without visual tokens has it."""
        specs = [spec for spec in self.stages[FIRST_LAYER].entry.inputs if spec.shape[0] == "num_visual"]
        sizes = {spec: tuple(int(size) for size in spec.shape[1:]) for spec in specs}
        return OrtVisual({spec.name: self.place.zeros((1, *size), spec.dtype) for spec, size in sizes.items()})

    def score(self, inputs: PrefillInputs, visual: Visual) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]. Its last layer runs on one token, and all caches are dropped."""
        stage, batch, columns = self.stages[FIRST_LAYER], len(inputs.source_rows), int(in_place(self.target))
        feeds, outputs = self.prompt_feeds(inputs, visual, 1), {}
        caches = ([spec for spec in specs if "." in spec.name] for specs in (stage.entry.inputs, stage.entry.outputs))
        for past, present in zip(*caches, strict=True):
            shape = tuple(columns if isinstance(size, str) else size for size in past.shape[1:])
            feeds[past.name] = self.place.zeros((batch, *shape), past.dtype)
            if columns:
                outputs[present.name] = feeds[past.name]
        return download(stage.run(feeds, outputs)["scores"])

    def start(self, batch: int, columns: int) -> "OrtGeneration":
        """A generation whose KV cache holds at least `columns` tokens a row."""
        return OrtGeneration(self, *self.caches.take(batch, columns))

    def gather(self, parts: "Sequence[tuple[Generation, int]]", columns: int) -> "OrtGeneration":
        """Rows of several generations as one, ready to decode; what is copied is copied on the device."""
        own = [(generation, row) for generation, row in parts if isinstance(generation, OrtGeneration)]
        if len(own) != len(parts):
            raise BackendError("gather: got a generation of another backend, expected what this backend's start made")
        return OrtGeneration(self, *self.caches.gather([generation.give_up(row) for generation, row in own], columns))

    def prompt_feeds(self, inputs: PrefillInputs, visual: Visual, num_kept_total: int) -> dict[str, ort.OrtValue]:
        """Inputs of both stages over a prompt, but for the cache."""
        text_embeds, source_rows = self.embedding_table[inputs.text_ids], inputs.source_rows
        if self.bundle.manifest.language.linear is not None and inputs.pads.any():
            # linear layers have no mask: padding that is zeros leaves their states as they are
            padding = np.arange(source_rows.shape[1]) < inputs.pads[:, None]
            source_rows = np.where(padding, -1 - len(text_embeds), source_rows)
            text_embeds = np.concatenate([text_embeds, np.zeros_like(text_embeds[:1])])
        arrays = {
            "text_embeds": text_embeds,
            "source_rows": source_rows,
            "position_ids": inputs.position_ids,
            "query_weights": inputs.query_weights,
            "select_bias": inputs.select_bias,
            "head_weights": inputs.head_weights,
            "slots": np.zeros(num_kept_total, np.int64),
            "kv_start": inputs.kv_start,
            "write_index": np.zeros(len(inputs.source_rows), np.int64),
        }
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


class OrtGeneration:
    """Requests in progress: slots of a KV cache, which are free again when it is gone."""

    def __init__(self, backend: OnnxRuntimeBackend, cache: KVCache, slots: list[int]) -> None:
        self.batch = len(slots)
        self.columns = cache.columns
        self._backend, self._cache = backend, cache
        self._slots = dict(enumerate(slots))  # by row, without those that were released
        self._hidden_states: tuple[ort.OrtValue, list[int]] | None = None
        weakref.finalize(self, backend.caches.give_back, cache, self._slots).atexit = False

    @property
    def nbytes(self) -> int:
        """Bytes of its slots."""
        return len(self._slots) * self._cache.row_bytes

    def prefill(self, inputs: PrefillInputs, visual: Visual, *, logits: bool) -> PrefillOutputs:
        """Run first_layer and decoder over the prompt."""
        cache, slots = self._cache, self._rows()
        if self._backend.target == CUDA and inputs.kv_start.any():
            raise BackendError(
                "kv_start: got prompts padded in front, expected none with cuda's graphs: run each alone"
            )
        rows = (slots[0], self.batch)
        started = time.perf_counter()
        tensors = self._backend.prompt_feeds(inputs, visual, inputs.num_kept_total)
        seconds = []
        for name in (FIRST_LAYER, DECODER):
            past, present = cache.inputs(name, *rows, empty=True), cache.outputs(name, *rows, inputs.num_kept_total)
            tensors |= self._backend.stages[name].run(tensors | past, present)
            seconds.append(time.perf_counter() - started)
        cache.settle(slots)
        cache.add_prompt(slots, inputs.kv_start, inputs.num_kept_total, tensors)
        self._hidden_states = (tensors["hidden_states"], list(range(self.batch)))
        step = StepOutputs(download(tensors["next_token"]), download(tensors["logits"]) if logits else None)
        return PrefillOutputs(
            step=step,
            kept_indices=download(tensors["kept_indices"]),
            scores=download(tensors["scores"]),
            first_layer_seconds=seconds[0],
            decoder_seconds=time.perf_counter() - started - seconds[0],
        )

    def decode(self, inputs: DecodeInputs, *, logits: bool) -> StepOutputs:
        """Run both stages over one token a row.

        Raises:
            BackendError: the cache is full, a row was released, or ONNX Runtime failed.
        """
        cache, slots = self._cache, self._rows()
        cache.check_room(slots)
        count = max(slots) + 1  # slots in between, of nobody or of others, run along and change nothing that counts
        tokens, positions = np.zeros((2, count), np.int64)
        tokens[slots], positions[slots] = inputs.token_ids, inputs.position_ids
        axes = self._backend.bundle.manifest.language.position_axes
        step = cache.step(count)
        step.run(
            cache,
            {
                "text_embeds": self._backend.embedding_table[tokens],
                "position_ids": np.tile(positions[:, None], (axes, 1, 1)),
                "kv_start": cache.first_columns()[:count],
                "write_index": cache.ends[:count],
            },
        )
        cache.settle(slots)
        cache.add_tokens(slots, step.tensors)
        self._hidden_states = (step.tensors["hidden_states"], slots)
        next_token = download(step.tensors["next_token"])[slots]
        return StepOutputs(next_token, download(step.tensors["logits"])[slots] if logits else None)

    def release(self, row: int) -> None:
        """Nobody asks for this row any more."""
        if row in self._slots:
            self._backend.caches.give_back(self._cache, {row: self._slots.pop(row)})

    def give_up(self, row: int) -> tuple[KVCache, int]:
        """Where a row lies, which this generation has no longer."""
        return self._cache, self._slots.pop(row)

    def hidden_states(self) -> npt.NDArray[np.float32]:
        """first_layer's output of the last step: float32 [batch, num_kept_total, hidden]."""
        if self._hidden_states is None:
            raise BackendError("hidden_states: nothing was run yet, expected a prefill before")
        tensor, rows = self._hidden_states
        return download(tensor)[rows].astype(np.float32)

    def cache(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a layer's keys and values, as far as written, or of its two states."""
        return self._cache.read(layer, self._rows())

    def _rows(self) -> list[int]:
        """The slot of each row."""
        if len(self._slots) < self.batch:
            raise BackendError("generation: a row was released or gathered, expected to gather the others first")
        return list(self._slots.values())
