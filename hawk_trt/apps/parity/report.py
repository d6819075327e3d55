"""Prompts through the bundle and through the reference -> a report of all stages, as JSON or in words and tables."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from hawk_trt.apps.parity.compare import SelectionRow, TokenRow, compare_selection, compare_tokens
from hawk_trt.request import ModelInputs, PruningConfig
from hawk_trt.runtime.comparison import StageRow, Tolerance, compare_stage
from hawk_trt.runtime.trace import traced

if TYPE_CHECKING:
    from hawk_trt.apps.parity.reference import EmbeddedPrompt, Reference
    from hawk_trt.pipeline import Pipeline

ParityCase: TypeAlias = tuple[str, ModelInputs]  # a prompt's name, and the tensors that both sides get


@dataclass(frozen=True, slots=True)
class CaseReport:
    """One prompt at one keep ratio."""

    name: str
    keep_ratio: float
    stages: tuple[StageRow, ...]  # vision, scores, first_layer, decoder; the first two where there are visual tokens
    selection: SelectionRow | None  # None without visual tokens
    tokens: TokenRow

    @property
    def title(self) -> str:
        """The prompt and its keep ratio."""
        return f"{self.name}, keep ratio {self.keep_ratio:g}"

    @property
    def failures(self) -> tuple[str, ...]:
        """What is out of tolerance, each with where."""
        rows = [(row.stage, row.failures) for row in self.stages]
        rows += [("kept set", self.selection.failures)] if self.selection else []
        rows += [("tokens", self.tokens.failures)]
        return tuple(f"{self.title}: {name}: {failure}" for name, failures in rows for failure in failures)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All cases, and what they were held to; dtype is the bundle's, reference_dtype that of the model in PyTorch."""

    bundle: str
    checkpoint: str
    backend: str
    dtype: str
    reference_dtype: str
    tolerance: Tolerance
    cases: tuple[CaseReport, ...]
    failures: tuple[str, ...]
    passed: bool


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
    name, inputs = case
    pruning = replace(pruning, query=pruning.query or "paper")  # the authors' rule, whatever the prompt
    result = pipe.generate(inputs, pruning=pruning, max_new_tokens=steps, ignore_eos=True)
    # After the last token nothing is compared, so the bundle is not fed with it; nor is the reference.
    trace = traced(pipe, inputs, pruning, forced_tokens=result.token_ids[:-1])
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
    return CaseReport(name, pruning.keep_ratio, tuple(stages), selection, tokens)


def told(report: ParityReport) -> Iterator[RenderableType]:
    """A block for each case, then the tolerances and the verdict, for a terminal."""
    for case in report.cases:
        yield Text(case.title, style="bold")
        yield _stage_table(case)
        if case.selection is not None:
            yield _line("kept set", _selection_in_words(case.selection), case.selection.failures)
        yield _line("tokens", _tokens_in_words(case.tokens), case.tokens.failures)
        yield ""
    yield f"{report.dtype}, {report.backend}, against PyTorch {report.reference_dtype}. {_limits(report)}"
    for failure in report.failures:
        yield Text(f"OUT OF TOLERANCE {failure}", style="red")
    good = sum(not case.failures for case in report.cases)
    yield Text(f"in tolerance: {good} of {len(report.cases)} cases", style="green" if report.passed else "red")


def _line(name: str, text: str, failures: tuple[str, ...]) -> Text:
    return Text.assemble(f"{name:<11} {text}  ", ("OUT", "red") if failures else ("ok", "green"))


def _stage_table(case: CaseReport) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("stage", min_width=11)
    for column in ("rows", "cosine", "worst", "norm ratio", "worst", "max error", "of largest"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for row in case.stages:
        shares = (row.cosine, row.cosine_min, row.norm_ratio, row.norm_ratio_worst)
        errors = (row.max_error, row.max_error_share)
        numbers = [*(f"{share:.6f}" for share in shares), *(f"{error:.1e}" for error in errors)]
        table.add_row(row.stage, str(row.rows), *numbers, "[red]OUT[/red]" if row.failures else "[green]ok[/green]")
    return table


def _selection_in_words(row: SelectionRow) -> str:
    margin = "" if row.margin is None else f", margin at the cut {row.margin:.1e}"
    swaps = f", swaps up to {row.swap_distance:.1e} from it" if row.swap_distance else ""
    return (
        f"{row.num_kept} of {row.num_visual}, overlap {row.overlap:.4f}{margin}{swaps}, "
        f"rank correlation {row.rank_correlation:.5f}, score error {row.score_error_share:.1e} of the spread"
    )


def _tokens_in_words(row: TokenRow) -> str:
    parted = f"part at step {row.first_difference}, margin {row.margin_there:.1e} of the largest logit"
    return (
        f"{row.steps} steps, argmax agrees {row.argmax_agreement:.3f}, KL {row.kl:.1e} nats, "
        f"free-running {'equal' if row.tokens_equal else parted}"
    )


def _limits(report: ParityReport) -> str:
    tolerance = report.tolerance
    stages = {name: getattr(tolerance, name) for name in ("vision", "scores", "first_layer", "decoder")}
    limits = [f"{name} {at.cosine:g} / 1 ± {at.norm_ratio:g} / {at.max_error:g}" for name, at in stages.items()]
    return (
        f"Tolerances (cosine / norm ratio / error of largest): {', '.join(limits)}; "
        f"scores and swaps at the cut {tolerance.score_error:g} of the spread; KL {tolerance.kl:g}"
    )
