"""One prompt through the bundle and through the reference, compared stage by stage."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hawk_trt.apps.parity.cases import ParityCase
from hawk_trt.apps.parity.compare import compare_selection, compare_tokens
from hawk_trt.apps.parity.report import CaseReport
from hawk_trt.request import PruningConfig
from hawk_trt.runtime.comparison import Tolerance, compare_stage

if TYPE_CHECKING:
    from hawk_trt.apps.parity.reference import EmbeddedPrompt, Reference
    from hawk_trt.pipeline import Pipeline


def compare_case(
    pipe: "Pipeline",
    reference: "Reference",
    case: ParityCase,
    embedded: "EmbeddedPrompt",
    pruning: PruningConfig,
    steps: int,
    tolerance: Tolerance,
) -> CaseReport:
    """Run one prompt on both sides and compare what each stage gave; embedded: the same prompt from reference.embed."""
    pruning = replace(pruning, query=pruning.query or "paper")  # the authors' rule, whatever the prompt
    result = pipe.generate(case.inputs, pruning=pruning, max_new_tokens=steps, ignore_eos=True)
    # After the last token nothing is compared, so the bundle is not fed with it; nor is the reference.
    trace = pipe.trace(case.inputs, pruning, forced_tokens=result.token_ids[:-1])
    expected = reference.run(embedded, pruning, forced_tokens=result.token_ids)
    selection = compare_selection(trace, expected, tolerance) if len(expected.visual_indices) else None
    if not np.array_equal(result.kept_indices, trace.kept_indices) and selection is not None:
        selection = replace(selection, failures=(*selection.failures, "generate and trace keep different tokens"))
    aligned = expected
    if not np.array_equal(trace.kept_indices, expected.kept_indices):
        # What follows is compared over the same tokens; whether the sets may differ is the selection's affair.
        aligned = reference.run(
            embedded, pruning, forced_tokens=result.token_ids, kept_indices=trace.kept_indices.tolist()
        )
    stages = []
    if selection is not None:
        stages.append(compare_stage("vision", trace.visual_embeds, expected.visual_embeds, tolerance.vision))
        stages.append(compare_stage("scores", trace.scores[None], expected.scores[None], tolerance.scores))
    stages.append(compare_stage("first_layer", trace.hidden_states, aligned.hidden_states, tolerance.first_layer))
    stages.append(compare_stage("decoder", trace.logits, aligned.logits, tolerance.decoder))
    tokens = compare_tokens(result.token_ids, trace, aligned, tolerance)
    return CaseReport(case.name, pruning.keep_ratio, tuple(stages), selection, tokens)
