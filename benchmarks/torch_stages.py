"""Times of transformers' own model, stage by stage as ours are cut, pruned and not.

HAWK inside it is parity/reference.py's: scores in front of layer 0, then the kept tokens through the whole model.
"""

import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Times
from hawk_trt import ModelInputs, PruningConfig
from hawk_trt.apps.parity.prompt_rules import PromptTokens
from hawk_trt.apps.parity.reference import Reference

# All layers share one piece of code, which is compiled again for the cache of each; the default limit is 8.
_RECOMPILE_LIMIT = 256


class TorchStages:
    """A checkpoint in transformers, float32, on the CPU.

    The clock is read where a stage begins: the language model, its layer 1, and the end of lm_head.
    """

    def __init__(self, checkpoint: Path, head_weights: tuple[float, ...], tokens: PromptTokens) -> None:
        self._reference = Reference.load(checkpoint, head_weights=head_weights, normalization="l2")
        self._tokens = tokens
        self._marks: dict[str, list[float]] = {}
        self._compiled: list[Any] = []
        model: Any = self._reference.model
        model.language.register_forward_pre_hook(lambda *_: self._mark("first_layer"))
        model.language.layers[1].register_forward_pre_hook(lambda *_: self._mark("decoder"))
        model.lm_head.register_forward_hook(lambda *_: self._mark("end"))

    def use(self, variant: str) -> None:
        """Run as "eager", "sdpa" or "compiled" from now on: transformers' attention functions, or SDPA's and compiled.

        Compiled is every language layer and vision block, with torch.compile's defaults and for any number of tokens;
        its forward alone, since the clock is read in hooks around it.
        """
        torch._dynamo.config.recompile_limit = _RECOMPILE_LIMIT
        model: Any = self._reference.model
        model._vision.set_attn_implementation("eager" if variant == "eager" else "sdpa")
        layers = (*model.language.layers, *model._vision.visual.blocks)
        if not self._compiled:
            self._compiled = [torch.compile(layer.forward, dynamic=True) for layer in layers]
        for layer, compiled in zip(layers, self._compiled, strict=True):
            layer.forward = compiled if variant == "compiled" else type(layer).forward.__get__(layer)

    def run(self, inputs: ModelInputs, keep_ratio: float, max_new_tokens: int) -> Times:
        """Answer a prompt; the stages' milliseconds."""
        self._marks = {"first_layer": [], "decoder": [], "end": []}
        with torch.inference_mode():
            begun = time.perf_counter()
            prompt = self._reference.embed(inputs, self._tokens)
            embedded = time.perf_counter()
            trace = self._reference.run(prompt, PruningConfig(keep_ratio), steps=max_new_tokens)
        first, middle, ends = (self._marks[name] for name in ("first_layer", "decoder", "end"))
        selected = keep_ratio < 1.0  # unpruned nobody would score
        scored = first[0] - embedded if selected else 0.0
        decode = ends[-1] - ends[0]
        total = ends[-1] - begun - (0.0 if selected else first[0] - embedded)
        return Times(
            vision=1e3 * (embedded - begun),
            score=1e3 * scored,
            first_layer=1e3 * (middle[0] - first[0] + scored),
            decoder=1e3 * (ends[0] - middle[0]),
            decode_step=1e3 * decode / max(len(ends) - 1, 1),
            total=1e3 * total,
            token_ids=trace.tokens,
            num_kept_total=len(trace.kept_indices),
        )

    def _mark(self, name: str) -> None:
        self._marks[name].append(time.perf_counter())
