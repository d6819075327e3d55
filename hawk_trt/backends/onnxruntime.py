"""The ONNX Runtime backend: the three stages on the CPU, or on a GPU through the CUDA provider."""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from hawk_trt.backends import DecodeInputs, PrefillOutputs, StepOutputs, Visual
from hawk_trt.backends.ort_session import Binding, Buffer, Device, Stage
from hawk_trt.bundle import Bundle, numpy_dtype
from hawk_trt.errors import BackendError
from hawk_trt.layout import PrefillInputs
from hawk_trt.stages import (
    BIAS_KEEP,
    DECODER,
    FIRST_LAYER,
    INPLACE,
    VISION,
    key_name,
    value_name,
)


class OrtVisual:
    """Visual embeddings as an OrtValue [rows, hidden]."""

    def __init__(self, value: ort.OrtValue, device: Device, dtype: str) -> None:
        self.value = value
        self._device = device
        self._dtype = dtype

    def numpy(self) -> npt.NDArray[Any]:
        """A host copy."""
        return self._device.download(self.value, self._dtype)


class OnnxRuntimeBackend:
    """A bundle in ONNX Runtime. Make it with `load`."""

    name = "onnxruntime"

    def __init__(self, bundle: Bundle, device: Device, profile: str, stages: dict[str, Stage]) -> None:
        self.bundle = bundle
        self.device = device.kind
        self.profile = profile
        self.stages = stages
        self.place = device
        self.embedding_table = bundle.embedding_table()

    @classmethod
    def load(cls, bundle: Bundle, device: str, profile: str | None) -> "OnnxRuntimeBackend":
        """Load the graphs of a profile (None: inplace where the bundle holds it).

        Raises:
            BackendError: the device or the dtype cannot be used here.
            BundleError: the bundle does not hold the profile.
        """
        manifest = bundle.manifest
        place = Device(device)
        if manifest.dtype == "bfloat16" and place.kind == "cpu":
            raise BackendError(
                "dtype: got a bfloat16 bundle, which ONNX Runtime's CPU provider cannot run. "
                "Export again with --dtype float32 or float16, or load with device='cuda'"
            )
        if profile is None:
            profile = INPLACE if INPLACE in manifest.profiles else manifest.profiles[0]
        stages = {}
        for stage in (VISION, FIRST_LAYER, DECODER):
            entry = manifest.graph(stage, profile)
            stages[stage] = Stage(bundle.folder / entry.file, entry, place)
        return cls(bundle, place, profile, stages)

    def encode(self, feeds: Iterable[dict[str, npt.NDArray[Any]]], num_rows: int) -> OrtVisual:
        """Run the vision stage, one call a feed, into num_rows rows; one zero row where there is none."""
        dtype = self.bundle.manifest.dtype
        hidden = self.bundle.manifest.language.hidden_size
        if not num_rows:
            return OrtVisual(self.place.zeros((1, hidden), dtype), self.place, dtype)
        target = self.place.empty((num_rows, hidden), dtype)
        stage, row = self.stages[VISION], 0
        for feed in feeds:
            count = len(feed["pixel_values"]) * len(feed["merge_order"])
            inputs = {name: self.place.upload(array) for name, array in feed.items()}
            binding = stage.bind(inputs, {})
            binding.output_rows("visual_embeds", target, row, count)
            binding.run()
            row += count
        return OrtVisual(target, self.place, dtype)

    def score(self, inputs: PrefillInputs, visual: Visual) -> npt.NDArray[np.float32]:
        """HAWK scores alone: float32 [batch, seq_len]. Layer 0 runs on one token, and its cache is dropped."""
        batch = len(inputs.input_ids)
        generation = OrtGeneration(self, batch, 1)
        binding = self.stages[FIRST_LAYER].bind(
            generation.prompt_feeds(inputs, visual, num_kept_total=1), generation.cache_outputs(FIRST_LAYER)
        )
        binding.run()
        return self.place.download(binding.results()["scores"], "float32")

    def start(self, batch: int, columns: int) -> "OrtGeneration":
        """A generation whose KV cache holds up to `columns` tokens a row."""
        return OrtGeneration(self, batch, columns)

    def close(self) -> None:
        """Release the sessions."""
        self.stages = {}


class OrtGeneration:
    """One request in ONNX Runtime: its KV cache, and the bindings of its decode step."""

    def __init__(self, backend: OnnxRuntimeBackend, batch: int, columns: int) -> None:
        self._backend = backend
        self._place = backend.place
        self._batch = batch
        self._inplace = backend.profile == INPLACE
        manifest = backend.bundle.manifest
        language = manifest.language
        self._stage_layers = {FIRST_LAYER: range(1), DECODER: range(1, language.num_hidden_layers)}
        shape = (batch, language.num_key_value_heads, columns if self._inplace else 0, language.head_dim)
        self._caches = {
            (layer, name): self._place.zeros(shape, manifest.dtype)
            for layer in range(language.num_hidden_layers)
            for name in (key_name, value_name)
        }
        self._write_index = Buffer(self._place, (batch,), "int64")
        self._length = 0
        self._kv_start: ort.OrtValue | None = None
        self._head_weights: ort.OrtValue | None = None
        self._hidden_states: ort.OrtValue | None = None
        self._step: _DecodeStep | None = None

    def prompt_feeds(self, inputs: PrefillInputs, visual: Visual, num_kept_total: int) -> dict[str, ort.OrtValue]:
        """Inputs of first_layer over the prompt."""
        assert isinstance(visual, OrtVisual)  # noqa: S101 - a backend only meets the visuals it made
        upload = self._place.upload
        feeds = {
            "text_embeds": upload(self._backend.embedding_table[inputs.input_ids]),
            "visual_embeds": visual.value,
            "visual_rows": upload(inputs.visual_rows),
            "position_ids": upload(inputs.position_ids),
            "query_weights": upload(inputs.query_weights),
            "select_bias": upload(inputs.select_bias),
            "head_weights": upload(inputs.head_weights),
            "slots": upload(np.zeros(num_kept_total, np.int64)),
            "kv_start": upload(inputs.kv_start),
        }
        return {**feeds, **self._cache_inputs(FIRST_LAYER)}

    def prefill(self, inputs: PrefillInputs, visual: Visual, *, logits: bool) -> PrefillOutputs:
        """Run first_layer and decoder over the prompt."""
        started = time.perf_counter()
        feeds = self.prompt_feeds(inputs, visual, inputs.num_kept_total)
        first = self._backend.stages[FIRST_LAYER].bind(feeds, self.cache_outputs(FIRST_LAYER))
        first.run()
        outputs = first.results()
        self._take_caches(FIRST_LAYER, outputs)
        middle = time.perf_counter()
        self._kv_start, self._head_weights = feeds["kv_start"], feeds["head_weights"]
        self._hidden_states = outputs["hidden_states"]
        decoder = self._backend.stages[DECODER].bind(
            {
                "hidden_states": outputs["hidden_states"],
                "kept_position_ids": outputs["kept_position_ids"],
                "kv_start": feeds["kv_start"],
                **self._cache_inputs(DECODER),
            },
            self.cache_outputs(DECODER),
        )
        decoder.run()
        results = decoder.results()
        self._take_caches(DECODER, results)
        self._length = inputs.num_kept_total
        step = self._step_outputs(results["next_token"], results["logits"], logits=logits)
        ended = time.perf_counter()
        return PrefillOutputs(
            step,
            self._place.download(outputs["kept_indices"], "int64"),
            self._place.download(outputs["scores"], "float32"),
            middle - started,
            ended - middle,
        )

    def decode(self, inputs: DecodeInputs, *, logits: bool) -> StepOutputs:
        """Run both stages over one token a row."""
        if self._step is None:
            self._step = _DecodeStep(self._backend, self, self._batch)
        self._write_index.set(self._length)
        self._step.run(inputs)
        self._length += 1
        self._hidden_states = self._step.hidden_states
        return self._step_outputs(self._step.next_token, self._step.logits, logits=logits)

    def hidden_states(self) -> npt.NDArray[np.float32]:
        """first_layer's output of the last step: float32 [batch, num_kept_total, hidden]."""
        assert self._hidden_states is not None  # noqa: S101 - asked for after a prefill only
        dtype = self._backend.stages[FIRST_LAYER].dtype("hidden_states")
        return self._place.download(self._hidden_states, dtype).astype(np.float32)

    def step_feeds(self) -> dict[str, ort.OrtValue]:
        """Inputs that stay the same in every decode step."""
        language = self._backend.bundle.manifest.language
        upload, batch = self._place.upload, self._batch
        assert self._kv_start is not None and self._head_weights is not None  # noqa: S101, PT018 - set by prefill
        return {
            "visual_embeds": self._place.zeros((1, language.hidden_size), self._backend.bundle.manifest.dtype),
            "visual_rows": upload(np.full((batch, 1), -1, np.int64)),
            "query_weights": upload(np.zeros((batch, 1), np.float32)),
            "select_bias": upload(np.full((batch, 1), BIAS_KEEP, np.float32)),
            "head_weights": self._head_weights,
            "slots": upload(np.zeros(1, np.int64)),
            "kv_start": self._kv_start,
        }

    def rebind_caches(self, stage: str, binding: Binding) -> None:
        """Point a decode binding at the caches of the last step (portable: they are new each step)."""
        for name, value in self._cache_inputs(stage).items():
            binding.input(name, value)
        for layer in self._stage_layers[stage]:
            for name in (key_name, value_name):
                binding.output(name(layer, past=False), None)

    def cache_inputs(self, stage: str) -> dict[str, ort.OrtValue]:
        """The cache as inputs of a stage, with where to write where it is written in place."""
        return self._cache_inputs(stage)

    def cache_outputs(self, stage: str) -> dict[str, ort.OrtValue]:
        """The cache as outputs of a stage: the same tensors in place, nothing (new memory) when portable."""
        if not self._inplace:
            return {}
        return {
            name(layer, past=False): self._caches[layer, name]
            for layer in self._stage_layers[stage]
            for name in (key_name, value_name)
        }

    def after_step(self, stage: str, binding: Binding) -> None:
        """Keep the new caches of a portable step."""
        if not self._inplace:
            self._take_caches(stage, binding.results())

    @property
    def inplace(self) -> bool:
        """Whether the cache is written in place."""
        return self._inplace

    def _cache_inputs(self, stage: str) -> dict[str, ort.OrtValue]:
        caches = {
            name(layer, past=True): self._caches[layer, name]
            for layer in self._stage_layers[stage]
            for name in (key_name, value_name)
        }
        return {"write_index": self._write_index.value, **caches} if self._inplace else caches

    def _take_caches(self, stage: str, outputs: dict[str, ort.OrtValue]) -> None:
        if not self._inplace:
            for layer in self._stage_layers[stage]:
                for name in (key_name, value_name):
                    self._caches[layer, name] = outputs[name(layer, past=False)]

    def _step_outputs(self, next_token: ort.OrtValue, logits_value: ort.OrtValue, *, logits: bool) -> StepOutputs:
        return StepOutputs(
            self._place.download(next_token, "int64"),
            self._place.download(logits_value, "float32") if logits else None,
        )


class _DecodeStep:
    """The decode step of one generation: every tensor at a fixed address, bound once (in place)."""

    def __init__(self, backend: OnnxRuntimeBackend, generation: OrtGeneration, batch: int) -> None:
        manifest, place = backend.bundle.manifest, backend.place
        language = manifest.language
        first, decoder = backend.stages[FIRST_LAYER], backend.stages[DECODER]
        self._backend = backend
        self._generation = generation
        self._embeds = Buffer(place, (batch, 1, language.hidden_size), manifest.dtype)
        self._positions = Buffer(place, (language.position_axes, batch, 1), "int64")
        self.hidden_states = place.empty((batch, 1, language.hidden_size), first.dtype("hidden_states"))
        positions = place.empty((language.position_axes, batch, 1), "int64")
        self.logits = place.empty((batch, language.vocab_size), "float32")
        self.next_token = place.empty((batch,), "int64")
        feeds = generation.step_feeds()
        self._first = first.bind(
            {
                "text_embeds": self._embeds.value,
                "position_ids": self._positions.value,
                **feeds,
                **generation.cache_inputs(FIRST_LAYER),
            },
            {
                "hidden_states": self.hidden_states,
                "kept_position_ids": positions,
                **generation.cache_outputs(FIRST_LAYER),
            },
        )
        self._decoder = decoder.bind(
            {
                "hidden_states": self.hidden_states,
                "kept_position_ids": positions,
                "kv_start": feeds["kv_start"],
                **generation.cache_inputs(DECODER),
            },
            {"logits": self.logits, "next_token": self.next_token, **generation.cache_outputs(DECODER)},
        )

    def run(self, inputs: DecodeInputs) -> None:
        """One step."""
        rows = self._backend.embedding_table[inputs.token_ids]
        self._embeds.set(rows[:, None].astype(numpy_dtype(self._backend.bundle.manifest.dtype), copy=False))
        self._positions.set(inputs.position_ids[None, :, None])
        for stage, binding in ((FIRST_LAYER, self._first), (DECODER, self._decoder)):
            if not self._generation.inplace:
                self._generation.rebind_caches(stage, binding)
            binding.run()
            self._generation.after_step(stage, binding)
