"""What a comparison came to: a report of all cases, as tables or JSON."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from hawk_trt.apps.parity.compare import SelectionRow, TokenRow
from hawk_trt.runtime.comparison import StageRow, Tolerance


@dataclass(frozen=True, slots=True)
class CaseReport:
    """One prompt at one keep ratio.

    Attributes:
        stages: vision, scores, first_layer and decoder; the first two only where there are visual tokens.
        selection: None without visual tokens.
    """

    name: str
    keep_ratio: float
    stages: tuple[StageRow, ...]
    selection: SelectionRow | None
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
    """All cases, and what they were held to.

    Attributes:
        backend: that ran the bundle, with its device.
        dtype: of the bundle.
        reference_dtype: of the checkpoint's model in PyTorch.
        failures: of all cases.
        passed: whether there is none.
    """

    bundle: str
    checkpoint: str
    backend: str
    dtype: str
    reference_dtype: str
    tolerance: Tolerance
    cases: tuple[CaseReport, ...]
    failures: tuple[str, ...]
    passed: bool


def print_report(report: ParityReport, console: Console) -> None:
    """Print a block for each case, then the tolerances and the verdict."""
    for case in report.cases:
        console.print(case.title, style="bold", markup=False, highlight=False)
        console.print(_stage_table(case))
        lines = [("tokens", _tokens_in_words(case.tokens), case.tokens.failures)]
        if case.selection is not None:
            lines.insert(0, ("kept set", _selection_in_words(case.selection), case.selection.failures))
        for name, text, failures in lines:
            console.print(f"{name:<11} {text}  {_verdict(failures)}\n", highlight=False, end="", soft_wrap=True)
        console.print()
    console.print(f"{report.dtype}, {report.backend}, against PyTorch {report.reference_dtype}. {_limits(report)}")
    for failure in report.failures:
        console.print(f"OUT OF TOLERANCE {failure}", style="red", markup=False, soft_wrap=True)
    good = sum(not case.failures for case in report.cases)
    console.print(f"in tolerance: {good} of {len(report.cases)} cases", style="green" if report.passed else "red")


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
        table.add_row(row.stage, str(row.rows), *numbers, _verdict(row.failures))
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


def _verdict(failures: tuple[str, ...]) -> str:
    return "[red]OUT[/red]" if failures else "[green]ok[/green]"
