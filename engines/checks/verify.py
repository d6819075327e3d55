"""The check of every stage right after a build: the plans against a reference, on prompts made for it.

In: an engine folder, and a reference: the bundle's own, or what ONNX Runtime makes now of the bundle or of a float32
export of the same checkpoint. Out: a row an output, with the numbers of its worst prompt and what is out of tolerance;
and in words what was not compared. The plans decode the reference's tokens, and behind the choice of visual tokens,
which has a row of its own, they keep the reference's, so that a stage is judged by what it computes itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from hawk_trt.bundle import REFERENCE, Bundle
from hawk_trt.engine_folder import EngineFolder
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.pipeline import Pipeline
from hawk_trt.pruning import kept_count
from hawk_trt.request import ModelInputs, PruningConfig
from hawk_trt.runtime.comparison import Tolerance, compare_stage, tolerance_of
from hawk_trt.runtime.reference import (
    BEST_LOGITS,
    STEPS,
    Floats,
    Reference,
    condensed,
    model_of,
    tensor_prompts,
    trace,
)
from hawk_trt.runtime.trace import Trace
from hawk_trt.stages import DECODER, FIRST_LAYER, STAGES, VISION

_FAILURES_SHOWN = 3
# A constant score has no spread; then any distance is too far.
_LEAST_SPREAD = 1e-30


@dataclass(frozen=True, slots=True)
class OutputRow:
    """One output over all prompts."""

    stage: str
    output: str  # visual_embeds, scores, kept set, hidden_states, KV norms of a layer, logits, tokens; or "finite"
    prompts: int  # how many it was looked at on
    numbers: str  # of the worst prompt in words; empty where only finiteness was looked at
    failures: tuple[str, ...]  # what is wrong, each with its prompt


@dataclass(frozen=True, slots=True)
class Verification:
    """The whole check; `reference` is None where there was nothing to compare with, and not_compared says why."""

    reference: str | None
    not_compared: str
    rows: tuple[OutputRow, ...]
    passed: bool

    @property
    def failures(self) -> str:
        """The first failures in one line."""
        told = [f"{row.stage}: {failure}" for row in self.rows for failure in row.failures]
        more = f" (and {len(told) - _FAILURES_SHOWN} more)" if len(told) > _FAILURES_SHOWN else ""
        return "; ".join(told[:_FAILURES_SHOWN]) + more


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt on both sides; `own` chose its visual tokens, `forced` was given those of `expected`."""

    name: str
    own: Trace
    forced: Trace
    expected: Trace


def load_reference(bundle: Bundle, given: Path | None = None) -> Reference | None:
    """What the plans of a bundle are compared with, None where there is nothing that this machine can run.

    It is a float32 export of the same checkpoint where one is given, else the bundle's own reference, or the bundle.

    Raises:
        HawkError: `given` is no such export, or the reference has to be made and there is no ONNX Runtime.
    """
    source = bundle if given is None else Bundle.load(given)
    manifest = source.manifest
    if given is not None and (manifest.dtype != "float32" or model_of(manifest)[0] != model_of(bundle.manifest)[0]):
        raise InvalidInput(
            f"--reference: {given} is {manifest.dtype} {manifest.family} with {manifest.normalization} scores, "
            f"expected a float32 export of the same checkpoint as {bundle.folder}"
        )
    if REFERENCE in manifest.files:
        reference = Reference.load(source.folder / REFERENCE)
        reference.check(bundle.manifest)
        return reference
    if manifest.dtype == "bfloat16":
        return None
    if find_spec("onnxruntime") is None:
        raise BackendError(
            f"onnxruntime: not installed, and the check after the build compares with it where {source.folder} has no "
            f"{REFERENCE}. pip install onnxruntime, or leave the check out with --no-verify"
        )
    with Pipeline.load(source.folder) as pipe:
        return Reference.make(pipe)


def verify(engines: Path, reference: Reference | None) -> Verification:
    """Run the plans of a folder, and compare them; prompts larger than their limits are left out.

    Without a reference it looks only whether all is finite.
    """
    limits = EngineFolder.load(engines).manifest.limits
    most = (limits.visual_tokens, limits.prompt_tokens, limits.context)
    with Pipeline.load(engines, device="cuda") as plans:
        manifest = plans.bundle.manifest
        scoring = manifest.language.scoring_layer
        pruning = PruningConfig(keep_ratio=manifest.keep_ratio)
        prompts = {}
        for name, inputs in tensor_prompts(manifest).items():
            layout = plans.processor.layout(inputs)
            kept = layout.num_tokens - layout.num_visual + kept_count(layout, pruning)
            sizes = (layout.num_visual, layout.num_tokens, kept + STEPS)
            if all(size <= limit for size, limit in zip(sizes, most, strict=True)):
                prompts[name] = inputs
        if not prompts:
            return Verification(None, "the limits are smaller than any prompt of the check: nothing was run", (), True)
        if reference is None:
            traces = {name: condensed(trace(plans, inputs)) for name, inputs in prompts.items()}
            rows = list(finite_rows(traces, scoring))
            why = (
                f"ONNX Runtime's CPU cannot run {manifest.dtype}, and the bundle has no {REFERENCE}, so numbers were "
                "not compared. Export the same checkpoint in float32 and give it with --reference"
            )
            return Verification(None, why, tuple(rows), not any(row.failures for row in rows))
        compared = [compare(plans, name, inputs, reference.prompts[name]) for name, inputs in prompts.items()]
    strict = reference.weights == model_of(manifest)[1]  # else the loss of quantising comes on top
    tolerance = tolerance_of(replace(manifest, weights=None) if strict else manifest)
    rows = [*finite_rows({p.name: p.own for p in compared}, scoring), *compared_rows(compared, tolerance, scoring)]
    return Verification(reference.made_by, "", tuple(rows), not any(row.failures for row in rows))


def compare(plans: Pipeline, name: str, inputs: ModelInputs, expected: Trace) -> Compared:
    """Run one prompt, once more where the plans choose other visual tokens."""
    tokens = expected.tokens.tolist()
    own = forced = condensed(trace(plans, inputs, tokens), expected.logit_ids)
    if not np.array_equal(own.kept, expected.kept):
        forced = condensed(trace(plans, inputs, tokens, expected.kept), expected.logit_ids)
    return Compared(name, own, forced, expected)


def finite_rows(prompts: Mapping[str, Trace], scoring_layer: int = 0) -> Iterator[OutputRow]:
    """One row a stage: all that it made is finite, and not all of it zero."""
    for stage in STAGES:
        failures = []
        for name, got in prompts.items():
            for output, values in (
                (output, values) for maker, output, values in _outputs(got, scoring_layer) if maker == stage
            ):
                bad = int(np.count_nonzero(~np.isfinite(values)))
                if bad:
                    failures.append(f"{name}: {output}: {bad} of {values.size} values are not finite")
                elif values.size and not values.any():
                    failures.append(f"{name}: {output}: all values are 0")
        yield OutputRow(stage, "finite", len(prompts), "", tuple(failures))


def compared_rows(prompts: Sequence[Compared], tolerance: Tolerance, scoring_layer: int = 0) -> Iterator[OutputRow]:
    """One row an output, in the order in which they are made; at least one prompt."""
    of_stage = {VISION: tolerance.vision, FIRST_LAYER: tolerance.first_layer, DECODER: tolerance.decoder}
    pairs = [
        (p.name, list(_outputs(p.forced, scoring_layer)), list(_outputs(p.expected, scoring_layer))) for p in prompts
    ]
    for index, (stage, output, _) in enumerate(pairs[0][2]):
        limit = tolerance.scores if output == "scores" else of_stage[stage]
        cosine, error, failures, seen = 1.0, 0.0, [], 0
        for name, got, expected in pairs:
            if not expected[index][2].size:  # a prompt without visual tokens
                continue
            row = compare_stage(stage, got[index][2], expected[index][2], limit)
            cosine, error = np.minimum(cosine, row.cosine_min), np.maximum(error, row.max_error_share)  # NaN stays
            failures += [f"{name}: {failure}" for failure in row.failures]
            seen += 1
        numbers = f"cosine {cosine:.6f}, error {error:.1e} of the largest" if seen else ""
        yield OutputRow(stage, output, seen, numbers, tuple(failures))
        if output == "scores":
            yield _kept_row([p for p in prompts if len(p.expected.scores)], tolerance.score_error)
    # two logits that are each off by the largest error allowed can change places when twice that apart
    yield _token_row(prompts, 2 * tolerance.decoder.max_error)


def _outputs(got: Trace, scoring_layer: int) -> Iterator[tuple[str, str, Floats]]:
    """Stage, name and rows of every output, in the order in which they are made."""
    yield VISION, "visual_embeds", got.visual_embeds
    yield FIRST_LAYER, "scores", got.scores[None]
    yield FIRST_LAYER, "hidden_states", got.hidden_states
    for layer, norms in enumerate(got.kv_norms):  # a row of keys and one of values
        yield FIRST_LAYER if layer <= scoring_layer else DECODER, f"KV norms of layer {layer}", norms
    yield DECODER, "logits", got.logits


def _kept_row(prompts: Sequence[Compared], limit: float) -> OutputRow:
    """A token may be kept instead of another only where both lie that near to the cut, as a share of the spread."""
    swapped, farthest, failures = 0, 0.0, []
    for name, got, expected in ((p.name, p.own, p.expected) for p in prompts):
        if got.kept.sum() != expected.kept.sum():
            failures.append(f"{name}: kept {got.kept.sum()} visual tokens, expected {expected.kept.sum()}")
        different = np.count_nonzero(got.kept & ~expected.kept)
        if different:
            cut = expected.scores[expected.kept].min()
            spread = max(float(np.ptp(expected.scores)), _LEAST_SPREAD)
            distance = float(np.abs(expected.scores[got.kept != expected.kept] - cut).max()) / spread
            swapped, farthest = swapped + different, max(farthest, distance)
            if not distance <= limit:
                failures.append(f"{name}: {different} tokens swapped, up to {distance:.1e} of the spread from the cut")
    numbers = f"{swapped} tokens swapped" + (f", up to {farthest:.1e} of the spread from the cut" if swapped else "")
    return OutputRow(FIRST_LAYER, "kept set", len(prompts), numbers, tuple(failures))


def _token_row(prompts: Sequence[Compared], limit: float) -> OutputRow:
    """Token by token; another token is allowed only where the reference's two logits are that near."""
    same, failures = 0, []
    for name, got, expected in ((p.name, p.forced, p.expected) for p in prompts):
        same += int(np.count_nonzero(got.tokens == expected.tokens))
        for step in np.flatnonzero(got.tokens != expected.tokens):
            logits, token, best = expected.logits[step], got.tokens[step], expected.tokens[step]
            # a token whose logit was not kept was less probable than BEST_LOGITS others
            known = logits[expected.logit_ids == token]
            its = known[0] if len(known) else np.sort(logits)[-min(BEST_LOGITS, len(logits))]
            margin = float(logits.max() - its)
            if not margin <= limit * float(np.abs(logits).max()):
                failures.append(f"{name}: step {step}: token {token}, expected {best} (logits {margin:.2g} apart)")
    total = sum(len(p.expected.tokens) for p in prompts)
    return OutputRow(DECODER, "tokens", len(prompts), f"{same} of {total} equal", tuple(failures))
