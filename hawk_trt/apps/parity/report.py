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
        name: of the prompt.
        keep_ratio: share of visual tokens kept.
        stages: vision, scores, first_layer and decoder; the first two only where there are visual tokens.
        selection: None without visual tokens.
        tokens: of the decode steps.
    """

    name: str
    keep_ratio: float
    stages: tuple[StageRow, ...]
    selection: SelectionRow | None
    tokens: TokenRow

    @property
    def failures(self) -> tuple[str, ...]:
        """What is out of tolerance, each with where."""
        rows = [(row.stage, row.failures) for row in self.stages]
        rows += [("kept set", self.selection.failures)] if self.selection else []
        rows += [("tokens", self.tokens.failures)]
        where = f"{self.name}, keep ratio {self.keep_ratio:g}"
        return tuple(f"{where}: {name}: {failure}" for name, failures in rows for failure in failures)


@dataclass(frozen=True, slots=True)
class ParityReport:
    """All cases, and what they were held to.

    Attributes:
        bundle: its folder.
        checkpoint: the reference's.
        backend: that ran the bundle, with its device.
        dtype: of the bundle.
        reference_dtype: of the reference.
        tolerance: of the dtype.
        cases: in the order run.
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
        console.print(f"{case.name}, keep ratio {case.keep_ratio:g}", style="bold", markup=False, highlight=False)
        console.print(_stage_table(case))
        for name, text, failures in _lines(case):
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
        table.add_row(
            row.stage,
            str(row.rows),
            f"{row.cosine:.6f}",
            f"{row.cosine_min:.6f}",
            f"{row.norm_ratio:.6f}",
            f"{row.norm_ratio_worst:.6f}",
            f"{row.max_error:.1e}",
            f"{row.max_error_share:.1e}",
            _verdict(row.failures),
        )
    return table


def _lines(case: CaseReport) -> list[tuple[str, str, tuple[str, ...]]]:
    """Kept set and tokens, each with its name and failures."""
    lines = []
    if (row := case.selection) is not None:
        margin = "" if row.margin is None else f", margin at the cut {row.margin:.1e}"
        swaps = f", swaps up to {row.swap_distance:.1e} from it" if row.swap_distance else ""
        text = (
            f"{row.num_kept} of {row.num_visual}, overlap {row.overlap:.4f}{margin}{swaps}, "
            f"rank correlation {row.rank_correlation:.5f}, score error {row.score_error_share:.1e} of the spread"
        )
        lines.append(("kept set", text, row.failures))
    tokens = case.tokens
    parted = f"part at step {tokens.first_difference}, margin {tokens.margin_there:.1e} of the largest logit"
    text = (
        f"{tokens.steps} steps, argmax agrees {tokens.argmax_agreement:.3f}, KL {tokens.kl:.1e} nats, "
        f"free-running {'equal' if tokens.tokens_equal else parted}"
    )
    return [*lines, ("tokens", text, tokens.failures)]


def _limits(report: ParityReport) -> str:
    tolerance = report.tolerance
    stages = (
        ("vision", tolerance.vision),
        ("scores", tolerance.scores),
        ("first_layer", tolerance.first_layer),
        ("decoder", tolerance.decoder),
    )
    limits = [f"{name} {limit.cosine:g} / 1 ± {limit.norm_ratio:g} / {limit.max_error:g}" for name, limit in stages]
    return (
        f"Tolerances (cosine / norm ratio / error of largest): {', '.join(limits)}; "
        f"scores and swaps at the cut {tolerance.score_error:g} of the spread; KL {tolerance.kl:g}"
    )


def _verdict(failures: tuple[str, ...]) -> str:
    return "[red]OUT[/red]" if failures else "[green]ok[/green]"
