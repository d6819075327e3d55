"""What a comparison came to: a report of all cases, as tables or JSON."""

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from hawk_trt.parity.compare import SelectionRow, StageRow, TokenRow
from hawk_trt.parity.tolerances import Tolerance


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


def print_tables(report: ParityReport, console: Console) -> None:
    """Print stages, kept sets and tokens as tables, then the verdict."""
    for table in (_stage_table(report), _selection_table(report), _token_table(report)):
        if table.row_count:
            console.print(table)
    limits = report.tolerance
    console.print(
        f"{report.dtype} {report.backend} against PyTorch {report.reference_dtype}; tolerances as cosine, "
        f"norm ratio and share of the largest value: "
        + "; ".join(
            f"{name} {limit.cosine:g}, 1 ± {limit.norm_ratio:g}, {limit.max_error:g}"
            for name, limit in (
                ("vision", limits.vision),
                ("scores", limits.scores),
                ("first_layer", limits.first_layer),
                ("decoder", limits.decoder),
            )
        )
        + f"; distance from the cut {limits.score_error:g}; KL {limits.kl:g}",
        soft_wrap=True,
    )
    for failure in report.failures:
        console.print(f"OUT OF TOLERANCE {failure}", style="red", markup=False, soft_wrap=True)
    if report.passed:
        console.print(f"in tolerance: {len(report.cases)} of {len(report.cases)} cases", style="green")


def _stage_table(report: ParityReport) -> Table:
    table = _table("stages", "case", "keep", "stage", ">rows", ">cosine", ">worst", ">norm ratio", ">worst", ">max error")
    table.add_column("of largest", justify="right")
    table.add_column("")
    for case in report.cases:
        for row in case.stages:
            table.add_row(
                case.name if row is case.stages[0] else "",
                f"{case.keep_ratio:g}" if row is case.stages[0] else "",
                row.stage,
                str(row.rows),
                f"{row.cosine:.6f}",
                f"{row.cosine_min:.6f}",
                f"{row.norm_ratio:.5f}",
                f"{row.norm_ratio_worst:.5f}",
                f"{row.max_error:.2g}",
                f"{row.max_error_share:.1e}",
                _verdict(row.failures),
                end_section=row is case.stages[-1],
            )
    return table


def _selection_table(report: ParityReport) -> Table:
    table = _table(
        "kept set", "case", "keep", ">kept", ">overlap", ">margin at cut", ">swaps from cut", ">rank corr.", ">score error"
    )
    table.add_column("of spread", justify="right")
    table.add_column("")
    for case in report.cases:
        if (row := case.selection) is not None:
            table.add_row(
                case.name,
                f"{case.keep_ratio:g}",
                f"{row.num_kept} of {row.num_visual}",
                f"{row.overlap:.4f}",
                "-" if row.margin is None else f"{row.margin:.2g}",
                f"{row.swap_distance:.1e}" if row.swap_distance else "-",
                f"{row.rank_correlation:.5f}",
                f"{row.score_error:.2g}",
                f"{row.score_error_share:.1e}",
                _verdict(row.failures),
            )
    return table


def _token_table(report: ParityReport) -> Table:
    table = _table("tokens", "case", "keep", ">steps", ">argmax agrees", ">KL (nats)", "free-running", "")
    for case in report.cases:
        row = case.tokens
        parted = f"differ at step {row.first_difference}, margin {row.margin_there:.1e} of the largest logit"
        table.add_row(
            case.name,
            f"{case.keep_ratio:g}",
            str(row.steps),
            f"{row.argmax_agreement:.3f}",
            f"{row.kl:.1e}",
            "equal" if row.tokens_equal else parted,
            _verdict(row.failures),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    """A table whose columns marked > hold numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return table


def _verdict(failures: tuple[str, ...]) -> str:
    return "[red]OUT[/red]" if failures else "[green]ok[/green]"
