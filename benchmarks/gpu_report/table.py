"""A report's JSON as Markdown, for BENCHMARKS.md."""

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.gpu_report.phases import PHASES

_STAGES = ("vision_ms", "score_ms", "first_layer_ms", "decoder_ms", "first_token_ms", "token_ms", "memory_mb")
_STAGE_WORDS = ("vision", "score", "first_layer", "decoder", "first token", "a token", "memory, MB")


def markdown(report: dict[str, Any]) -> str:
    """What every phase found, those that failed or were skipped with their reason.

    Args:
        report: what the command wrote.
    """
    phases: dict[str, dict[str, Any]] = report["phases"]
    lines = [*_machine(phases.get("machine", {}).get("results", {}), report["rehearsal"]), ""]
    lines += ["| phase | | seconds |", "| --- | --- | --- |"]
    for name in PHASES:
        if name in phases:
            outcome = phases[name]
            reason = f": {_cell(outcome['reason'])}" if outcome["reason"] else ""
            lines.append(f"| {name} | {outcome['status']}{reason} | {outcome['seconds']:.0f} |")
    for name, write in _SECTIONS.items():
        results = phases.get(name, {}).get("results", {})
        if results:
            lines += ["", *write(results)]
    return "\n".join(lines)


def _machine(found: dict[str, Any], rehearsal: str | None) -> Iterator[str]:
    if rehearsal:
        yield f"**A rehearsal ({rehearsal}) without a GPU: its times mean nothing.**"
        yield ""
    words = [found.get("gpu", "an unknown GPU")]
    words += [f"{word} {found[word]}" for word in ("driver", "cuda", "nvcc") if found.get(word)]
    words += [f"{name} {version}" for name, version in found.get("packages", {}).items()]
    yield f"{', '.join(words)}, Python {found.get('python', '?')}, hawk_trt {found.get('commit') or '?'}."


def _kernel(results: dict[str, Any]) -> Iterator[str]:
    cases, failures = results.get("cases", 0), results.get("failures", [])
    checked = ", ".join(results.get("checked", []))
    yield f"Kernel ({checked}): {cases - len(failures)} of {cases} answers are the oracle's."
    yield ""
    yield "| positions, kept | what | mode | ours, us | PyTorch, us | times faster |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in results.get("timings", []):
        ours, theirs = row["ours_us"], row["torch_us"]
        yield (
            f"| {row['positions']:,}, {row['kept']:,} | {row['what']} | {row['mode']} "
            f"| {ours:.1f} | {theirs:.1f} | {theirs / ours:.1f} |"
        )


def _driver(results: dict[str, Any]) -> Iterator[str]:
    checks, failures = results.get("checks", []), results.get("failures", [])
    yield f"CUDA driver layer: {len(checks) - len(failures)} of {len(checks)} checks hold."
    for row in results.get("backend", []):
        yield f"* Backend over mixing engines, {row['target']}: {_row(row, _backend)}"


def _backend(row: dict[str, Any]) -> str:
    return (
        f"{row['answers']} answers equal to the stand-in's to the last bit, {row['graphs_captured']} graphs captured, "
        f"{row['decode_step_ms']:.2f} ms a step"
    )


def _tiny(results: dict[str, Any]) -> Iterator[str]:
    model = results.get("model", "tiny-vlm")
    yield f"| {model} on the GPU against the CPU | graphs | answers equal | kept sets equal | scores, logits: error |"
    yield "| --- | --- | --- | --- | --- |"
    for row in results.get("dtypes", []):
        yield f"| {row['dtype']} | {row.get('runs', '')} | {_row(row, _compared)} |"


def _compared(row: dict[str, Any]) -> str:
    if "answers" not in row:
        return "ran, nothing compared | |"
    return (
        f"{row['answers_equal']} of {row['answers']} | {row['kept_sets_equal']} of {row['answers']} "
        f"| {row['scores_error']:.1e}, {row['logits_error']:.1e}"
    )


def _shape(results: dict[str, Any]) -> Iterator[str]:
    settled = [f"{word.removesuffix('_mb')} {results[word]} MB" for word in ("weights_mb",) if word in results]
    yield f"{results.get('model', '')}, {results.get('dtype', '')}, {', '.join(settled)}, ms:"
    yield ""
    yield f"| kept | CUDA graph | {' | '.join(_STAGE_WORDS)} |"
    yield f"| --- | --- |{' --- |' * len(_STAGES)}"
    for row in results.get("stages", []):
        graph = {True: "yes", False: "no", None: ""}[row.get("cuda_graph")]
        kept = f"{row['kept']} of {row['of']}" if "kept" in row else f"{row['keep_ratio']:.0%}"
        yield f"| {kept} | {graph} | {_row(row, _stage_cells)} |"


def _stage_cells(row: dict[str, Any]) -> str:
    return " | ".join(f"{row[name]:,.0f}" if name == "memory_mb" else f"{row[name]:.2f}" for name in _STAGES)


def _transformers(results: dict[str, Any]) -> Iterator[str]:
    if "first_token_ms" in results:
        yield (
            f"transformers {results['transformers']} ({results['attention']}), {results['dtype']}, nothing pruned: "
            f"vision {results['vision_ms']:.2f} ms, first token {results['first_token_ms']:.2f} ms, "
            f"a token {results['token_ms']:.2f} ms, memory {results['memory_mb']:,} MB."
        )


def _tensorrt(results: dict[str, Any]) -> Iterator[str]:
    if "self_test" in results:
        yield results["self_test"].strip()
        yield ""
    yield "TensorRT:"
    yield from _shape(results)


def _row(row: dict[str, Any], write: Callable[[dict[str, Any]], str]) -> str:
    """The cells of a row, or why there are none."""
    return f"FAILED: {_cell(row['failed'])}" if row.get("failed") else write(row)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


_SECTIONS: dict[str, Callable[[dict[str, Any]], Iterator[str]]] = {
    "kernel": _kernel,
    "driver": _driver,
    "tiny": _tiny,
    "hybrid": _tiny,
    "families": _tiny,
    "shape_bfloat16": _shape,
    "transformers": _transformers,
    "shape_float16": _shape,
    "tensorrt": _tensorrt,
}
