"""The ONNX Runtime backend: the three stages on the CPU, or on a GPU through the CUDA provider."""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hawk_trt.bundle import Bundle, Manifest
from hawk_trt.errors import BackendError
from hawk_trt.inputs.layout import PrefillInputs
from hawk_trt.runtime.kv_cache import KVCache
from hawk_trt.runtime.protocol import DecodeInputs, Generation, PrefillOutputs, StepOutputs, Visual
from hawk_trt.runtime.session import Buffer, Device, Stage
from hawk_trt.runtime.versions import OPSET_24_ONNX_RUNTIME, QUANTISED_ONNX_RUNTIME, at_least
from hawk_trt.stages import BIAS_KEEP, DECODER, FIRST_LAYER, PORTABLE, STAGES, TENSORRT, VISION


class OrtVisual:
    """What the vision stage made, by first_layer's input names.

    visual_embeds: [rows, hidden]; deepstack_embeds, where the family has them: [rows, levels, hidden].
    """

    def __init__(self, values: Mapping[str, ort.OrtValue], device: Device, dtype: str) -> None:
        self.values = values
        self._device = device
        self._dtype = dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(value.tensor_size_in_bytes() for value in self.values.values())

    def numpy(self) -> npt.NDArray[Any]:
        """A host copy of the embeddings."""
        return self._device.download(self.values["visual_embeds"], self._dtype)


class OnnxRuntimeBackend:
    """A bundle in ONNX Runtime. Make it with `load`.

    Attributes:
        bundle: what was loaded.
        stages: its graphs by stage name.
        place: where they compute.
        embedding_table: [vocab, hidden], memory-mapped.
    """

    name = "onnxruntime"
    max_vision_patches = 16384  # bounds the memory of a call
    max_context: int | None = None  # each request takes what it needs
    max_batch: int | None = None
    max_start: int | None = None
    can_gather = True

    def __init__(self, bundle: Bundle, place: Device, target: str) -> None:
        entries = [bundle.manifest.graph(stage, target) for stage in STAGES]
        self.bundle = bundle
        self.device = place.kind
        self.target = target
        self.stages = {entry.stage: Stage(bundle.folder / entry.file, entry, place) for entry in entries}
        self.place = place
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
        if target == TENSORRT:
            raise BackendError(
                "target: got tensorrt, whose graphs the engine builder takes, expected cpu, cuda or portable"
            )
        if target is None:
            best = place.kind  # a target bears its name
            old = not at_least(ort.__version__, OPSET_24_ONNX_RUNTIME[best])
            target = PORTABLE if old or (best not in manifest.targets and PORTABLE in manifest.targets) else best
        return cls(bundle, place, target)

    def encode(self, feeds: Iterable[dict[str, npt.NDArray[Any]]], num_rows: int) -> OrtVisual:
        """Run the vision stage, one call a feed, into num_rows rows; one zero row where there is none."""
        dtype = self.bundle.manifest.dtype
        if not num_rows:
            return OrtVisual(self.no_visual(), self.place, dtype)
        stage = self.stages[VISION]
        parts = []
        for feed in feeds:
            binding = stage.bind({name: self.place.upload(array) for name, array in feed.items()}, {})
            binding.run()
            parts.append(OrtVisual(binding.results(), self.place, dtype))
        return self.join(parts)

    def keep(self, visual: Visual) -> OrtVisual:
        """On the CPU a copy: an output kept would hold on to all the memory that ONNX Runtime took for its run."""
        own = self._own(visual)
        if self.device != "cpu":
            return own
        dtype = self.bundle.manifest.dtype
        copies = {name: self.place.upload(self.place.download(value, dtype)) for name, value in own.values.items()}
        return OrtVisual(copies, self.place, dtype)

    def join(self, parts: Sequence[Visual]) -> OrtVisual:
        """The rows of all, one below the other; a single part is not copied."""
        dtype, own = self.bundle.manifest.dtype, [self._own(part).values for part in parts]
        values = {name: self.place.concatenate([part[name] for part in own], dtype) for name in own[0]}
        return OrtVisual(values, self.place, dtype)

    def no_visual(self) -> dict[str, ort.OrtValue]:
        """One zero row, as a prompt without visual tokens and a decode step have it."""
        language = self.bundle.manifest.language
        specs = {
            "visual_embeds": (1, language.hidden_size),
            "deepstack_embeds": (1, language.deepstack_levels, language.hidden_size),
        }
        names = [spec.name for spec in self.stages[FIRST_LAYER].entry.inputs]
        dtype = self.bundle.manifest.dtype
        return {name: self.place.zeros(shape, dtype) for name, shape in specs.items() if name in names}

    def score(self, inputs: PrefillInputs, visual: Visual) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]. Layer 0 runs on one token, and its cache is dropped."""
        cache = KVCache(self.bundle.manifest, self.place, self.target, len(inputs.source_rows), 1)
        binding = self.stages[FIRST_LAYER].bind(
            {**self.prompt_feeds(inputs, visual, 1), **cache.inputs(FIRST_LAYER)}, cache.outputs(FIRST_LAYER)
        )
        binding.run()
        return self.place.download(binding.results()["scores"], "float32")

    def start(self, batch: int, columns: int) -> "OrtGeneration":
        """A generation whose KV cache holds up to `columns` tokens a row."""
        return OrtGeneration(self, KVCache(self.bundle.manifest, self.place, self.target, batch, columns))

    def gather(self, parts: "Sequence[tuple[Generation, int]]", columns: int) -> "OrtGeneration":
        """Rows of several generations as one; on a GPU their caches go through the host."""
        own = []
        for generation, row in parts:
            if not isinstance(generation, OrtGeneration):
                raise BackendError(f"gather: got {type(generation).__name__}, expected what this backend's start made")
            own.append((generation, row))
        return OrtGeneration.gather(self, own, columns)

    def prompt_feeds(self, inputs: PrefillInputs, visual: Visual, num_kept_total: int) -> dict[str, ort.OrtValue]:
        """Inputs of first_layer over a prompt, but for the cache."""
        upload = self.place.upload
        return {
            "text_embeds": upload(self.embedding_table[inputs.text_ids]),
            **self._own(visual).values,
            "source_rows": upload(inputs.source_rows),
            "position_ids": upload(inputs.position_ids),
            "query_weights": upload(inputs.query_weights),
            "select_bias": upload(inputs.select_bias),
            "head_weights": upload(inputs.head_weights),
            "slots": upload(np.zeros(num_kept_total, np.int64)),
            "kv_start": upload(inputs.kv_start),
        }

    def close(self) -> None:
        """Release the sessions."""
        self.stages.clear()

    @staticmethod
    def _own(visual: Visual) -> OrtVisual:
        if not isinstance(visual, OrtVisual):
            raise BackendError(f"visual: got {type(visual).__name__}, expected what this backend's encode made")
        return visual


def _check_weights(manifest: Manifest) -> None:
    """Refuse an ONNX Runtime that would turn quantised weights into floats again at every step, in seconds a token."""
    if manifest.weights is not None and not at_least(ort.__version__, QUANTISED_ONNX_RUNTIME):
        raise BackendError(
            f"weights: got int{manifest.weights.bits}, which ONNX Runtime {ort.__version__} cannot multiply by, "
            f"expected {QUANTISED_ONNX_RUNTIME} or newer. pip install -U onnxruntime (it needs "
            "Python 3.11), or export again with --dtype float32"
        )


class OrtGeneration:
    """One request in ONNX Runtime: its KV cache and, after the prefill, its decode step."""

    def __init__(self, backend: OnnxRuntimeBackend, cache: KVCache) -> None:
        self.batch = cache.batch
        self.columns = cache.columns
        self._backend = backend
        self._cache = cache
        self._step: _DecodeStep | None = None
        self._fixed: dict[str, ort.OrtValue] = {}
        self._hidden_states: ort.OrtValue | None = None

    @classmethod
    def gather(
        cls, backend: OnnxRuntimeBackend, parts: "Sequence[tuple[OrtGeneration, int]]", columns: int
    ) -> "OrtGeneration":
        """Rows of several generations as one, ready to decode."""
        for generation, _ in parts:
            generation._step = None  # its bindings hold on to the cache
        caches = [(generation._cache, row) for generation, row in parts]
        cache = KVCache.gather(backend.bundle.manifest, backend.place, backend.target, caches, columns)
        gathered = cls(backend, cache)
        gathered._fixed = {
            "kv_start": backend.place.upload(cache.starts),
            "head_weights": parts[0][0]._fixed["head_weights"],  # a step has nothing to score
        }
        return gathered

    @property
    def nbytes(self) -> int:
        """Bytes of its KV cache."""
        return self._cache.nbytes

    def prefill(self, inputs: PrefillInputs, visual: Visual, *, logits: bool) -> PrefillOutputs:
        """Run first_layer and decoder over the prompt."""
        stages, place, cache = self._backend.stages, self._backend.place, self._cache
        started = time.perf_counter()
        feeds = self._backend.prompt_feeds(inputs, visual, inputs.num_kept_total)
        first = stages[FIRST_LAYER].bind({**feeds, **cache.inputs(FIRST_LAYER)}, cache.outputs(FIRST_LAYER))
        first.run()
        outputs = first.results()
        cache.take(FIRST_LAYER, outputs)
        middle = time.perf_counter()
        chained = {spec.name: outputs[spec.name] for spec in stages[DECODER].entry.inputs if spec.name in outputs}
        decoder = stages[DECODER].bind(
            {**chained, "kv_start": feeds["kv_start"], **cache.inputs(DECODER)}, cache.outputs(DECODER)
        )
        decoder.run()
        results = decoder.results()
        cache.take(DECODER, results)
        cache.starts[:] = inputs.kv_start
        cache.advance(inputs.num_kept_total)
        self._fixed = {name: feeds[name] for name in ("kv_start", "head_weights")}
        self._hidden_states = outputs["hidden_states"]
        step = _read_step(place, results["next_token"], results["logits"], logits=logits)
        ended = time.perf_counter()
        return PrefillOutputs(
            step=step,
            kept_indices=place.download(outputs["kept_indices"], "int64"),
            scores=place.download(outputs["scores"], "float32"),
            first_layer_seconds=middle - started,
            decoder_seconds=ended - middle,
        )

    def decode(self, inputs: DecodeInputs, *, logits: bool) -> StepOutputs:
        """Run both stages over one token a row.

        Raises:
            BackendError: the cache is full, or ONNX Runtime failed.
        """
        if self._step is None:
            self._step = _DecodeStep(self._backend, self._cache, self._fixed)
        self._cache.check_room(1)
        self._step.run(inputs)
        self._cache.advance(1)
        self._hidden_states = self._step.hidden_states
        return _read_step(self._backend.place, self._step.next_token, self._step.logits, logits=logits)

    def release(self, row: int) -> None:
        """Nothing: the memory of a row comes back when the others are gathered."""

    def hidden_states(self) -> npt.NDArray[np.float32]:
        """first_layer's output of the last step: float32 [batch, num_kept_total, hidden]."""
        if self._hidden_states is None:
            raise BackendError("hidden_states: nothing was run yet, expected a prefill before")
        dtype = self._backend.stages[FIRST_LAYER].dtype("hidden_states")
        return self._backend.place.download(self._hidden_states, dtype).astype(np.float32)

    def cache(self, layer: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Host copies of a layer's keys and values: [batch, kv_heads, columns, head_dim], as far as written."""
        key, value = (
            self._backend.place.download(tensor, self._backend.bundle.manifest.dtype)[:, :, : self._cache.length]
            for tensor in self._cache.tensors(layer)
        )
        return key, value


class _DecodeStep:
    """The decode step of one generation: all but a portable cache at fixed addresses, bound once."""

    def __init__(self, backend: OnnxRuntimeBackend, cache: KVCache, fixed: Mapping[str, ort.OrtValue]) -> None:
        manifest, place, batch = backend.bundle.manifest, backend.place, cache.batch
        language = manifest.language
        first, decoder = backend.stages[FIRST_LAYER], backend.stages[DECODER]
        self._table = backend.embedding_table
        self._cache = cache
        self._embeds = Buffer(place, (batch, language.hidden_size), manifest.dtype)
        self._positions = Buffer(place, (language.position_axes, batch, 1), "int64")
        self.hidden_states = place.empty((batch, 1, language.hidden_size), first.dtype("hidden_states"))
        self.logits = place.empty((batch, language.vocab_size), "float32")
        self.next_token = place.empty((batch,), "int64")
        chained = {
            "hidden_states": self.hidden_states,
            "kept_position_ids": place.empty((language.position_axes, batch, 1), "int64"),
        }
        if language.deepstack_levels > 1:
            shape = (batch, 1, language.deepstack_levels - 1, language.hidden_size)
            chained["deepstack_states"] = place.empty(shape, manifest.dtype)
        feeds = {
            "text_embeds": self._embeds.value,
            "position_ids": self._positions.value,
            **backend.no_visual(),
            "source_rows": place.upload(-1 - np.arange(batch, dtype=np.int64)[:, None]),
            "query_weights": place.zeros((batch, 1), "float32"),
            "select_bias": place.upload(np.full((batch, 1), BIAS_KEEP, np.float32)),
            "slots": place.zeros((1,), "int64"),
            **fixed,
        }
        self._bindings = {
            FIRST_LAYER: first.bind({**feeds, **cache.inputs(FIRST_LAYER)}, {**chained, **cache.outputs(FIRST_LAYER)}),
            DECODER: decoder.bind(
                {**chained, "kv_start": fixed["kv_start"], **cache.inputs(DECODER)},
                {"logits": self.logits, "next_token": self.next_token, **cache.outputs(DECODER)},
            ),
        }

    def run(self, inputs: DecodeInputs) -> None:
        """One step."""
        self._embeds.set(self._table[inputs.token_ids])
        self._positions.set(inputs.position_ids[None, :, None])
        for stage, binding in self._bindings.items():
            self._cache.rebind(stage, binding)
            binding.run()
            self._cache.take_step(stage, binding)


def _read_step(place: Device, next_token: ort.OrtValue, logits_value: ort.OrtValue, *, logits: bool) -> StepOutputs:
    return StepOutputs(place.download(next_token, "int64"), place.download(logits_value, "float32") if logits else None)
