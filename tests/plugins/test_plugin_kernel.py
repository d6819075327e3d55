"""The plugin's kernel file, unmodified, on fibers of a CPU thread, against the numpy oracle."""

import re
import shutil
import subprocess
import sys

import numpy as np
import on_cpu
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.gpu_report.topk_cases import Case, disagreement, random_case
from benchmarks.gpu_report.topk_library import Addresses, KernelLibrary, Sizes
from export import weighted_topk as node
from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.pruning import hawk
from hawk_trt.stages import BIAS_DROP, BIAS_KEEP, NORMALIZATIONS


@pytest.fixture(scope="session")
def kernel_file(repository):
    return on_cpu.compile_for_cpu(repository / "build" / "plugins-on-cpu")


def address(array):
    return array.ctypes.data


def run(kernel, case, *, schedule=1, garbage=0xFF):
    """The kernel's answer; its outputs and workspace start as garbage."""
    sizes = case.sizes
    kept = np.full((sizes.batch, sizes.num_kept), -1, np.int32)
    scores = np.full((sizes.batch, sizes.seq_len), np.nan, np.float32)
    size = kernel.workspace_bytes(sizes)
    workspace = np.full(size + 64, garbage, np.uint8)
    workspace[size:] = 0xA5
    inputs = [
        np.ascontiguousarray(a) for a in (case.head_scores, case.head_weights, case.visual_rows, case.select_bias)
    ]
    addresses = Addresses(*(address(array) for array in (*inputs, kept, scores)))
    kernel.enqueue(addresses, sizes, address(workspace), schedule)
    assert (workspace[size:] == 0xA5).all()
    return kept, scores


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@settings(max_examples=100)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    heads=st.integers(1, 40),
    seq_len=st.one_of(st.integers(1, 80), st.integers(480, 1100)),
    share=st.floats(0, 1),
    ties=st.booleans(),
    broken=st.booleans(),
    small_bias=st.booleans(),
)
def test_the_kernel_follows_the_oracle(
    kernel_file, normalization, seed, batch, heads, seq_len, share, ties, broken, small_bias
):
    sizes = Sizes(batch, heads, seq_len, max(1, round(share * seq_len)))
    case = random_case(seed, sizes, ties=ties, broken=broken, small_bias=small_bias)
    kept, scores = run(KernelLibrary(kernel_file, normalization), case, schedule=seed)
    assert disagreement(case, normalization, kept, scores) is None
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("seq_len", [1, 2, 512, 513, 16_384, 16_385, 32_769])
def test_every_number_of_kept_positions_is_exact(kernel_file, normalization, seq_len):
    kernel = KernelLibrary(kernel_file, normalization)
    for num_kept in {1, seq_len // 5 or 1, seq_len - 1 or 1, seq_len}:
        case = random_case(num_kept, Sizes(1, 2, seq_len, num_kept), ties=seq_len % 2 == 0)
        assert disagreement(case, normalization, *run(kernel, case)) is None


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_a_row_of_65536_positions_is_exact(kernel_file, normalization):
    case = random_case(7, Sizes(1, 3, 65_536, 13_107), ties=True)
    assert disagreement(case, normalization, *run(KernelLibrary(kernel_file, normalization), case)) is None


@pytest.mark.parametrize("seq_len", [300, 3000])
def test_the_order_in_which_threads_run_changes_no_bit(kernel_file, seq_len):
    kernel = KernelLibrary(kernel_file, "softmax")
    case = random_case(3, Sizes(2, 9, seq_len, seq_len // 3), ties=True, broken=True)
    first = run(kernel, case, schedule=1, garbage=0)
    for schedule in range(2, 12):
        other = run(kernel, case, schedule=schedule)
        np.testing.assert_array_equal(first[0], other[0])
        np.testing.assert_array_equal(first[1], other[1])


def test_the_lower_index_wins_a_tie(kernel_file):
    for seq_len in (400, 5000):
        rows = np.arange(seq_len)[None]
        case = Case(np.ones((1, 4, seq_len), np.float32), np.ones(4, np.float32), rows, 0 * rows.astype("f4"), 333)
        kept, _ = run(KernelLibrary(kernel_file, "l2"), case)
        assert kept[0].tolist() == list(range(333))


def test_the_norm_of_16384_positions_is_accurate(kernel_file):
    case = random_case(5, Sizes(1, 28, 16_384, 3277))
    _, scores = run(KernelLibrary(kernel_file, "l2"), case)
    exact = np.where(case.visual_rows[:, None] >= 0, case.head_scores, 0).astype(np.float64)
    exact /= np.linalg.norm(exact, axis=-1, keepdims=True)
    exact = np.einsum("h,bhn->bn", case.head_weights.astype(np.float64), exact)
    assert np.abs(scores - exact).max() < 1e-6 * np.abs(exact).max()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("score", [0.0, -2.5, 1e-30, 1e30, -1e30])
def test_scores_that_are_all_equal_or_extreme_stay_finite(kernel_file, normalization, score):
    for seq_len in (40, 800):
        case = random_case(6, Sizes(1, 3, seq_len, seq_len // 2))
        case.head_scores[:, 0] = score
        case.head_scores[:, 1] = np.where(np.arange(seq_len) % 3, score, 0)
        kept, scores = run(KernelLibrary(kernel_file, normalization), case)
        assert np.isfinite(scores).all()
        assert disagreement(case, normalization, kept, scores) is None


def test_a_bias_decides_alone(kernel_file):
    case = random_case(11, Sizes(1, 4, 700, 3))
    chosen = np.array([5, 300, 699])
    case.select_bias[:] = BIAS_DROP
    case.select_bias[0, chosen], case.visual_rows[0, chosen] = BIAS_KEEP, chosen
    kept, scores = run(KernelLibrary(kernel_file, "l2"), case)
    np.testing.assert_array_equal(kept[0], chosen)
    assert scores[case.visual_rows >= 0].any()
    case.head_weights[0] = np.nan  # whatever the score
    kept, _ = run(KernelLibrary(kernel_file, "l2"), case)
    np.testing.assert_array_equal(kept[0], chosen)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_without_visual_tokens_every_score_is_zero(kernel_file, normalization):
    case = random_case(2, Sizes(1, 3, 600, 600))
    case.visual_rows[:] = -1
    kept, scores = run(KernelLibrary(kernel_file, normalization), case)
    assert not scores.any()
    assert (kept == np.arange(600)).all()


def test_a_key_that_is_not_a_number_comes_last(kernel_file):
    case = random_case(4, Sizes(1, 2, 900, 899))
    case.select_bias[:] = 0
    case.select_bias[0, 77] = np.nan
    kept, scores = run(KernelLibrary(kernel_file, "l2"), case)
    assert 77 not in kept[0]
    expected, _ = hawk.weighted_topk(case.head_scores, case.head_weights, case.visual_rows, case.select_bias, 899, "l2")
    np.testing.assert_array_equal(kept, expected)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(1, 2, 5, 6),
        Sizes(1, 2, 5, 0),
        Sizes(1, 2, 900, 0),
        Sizes(1, 2, 0, 0),
        Sizes(1, 1025, 5, 1),
        Sizes(65_536, 1, 1, 1),
        Sizes(1, 0, 5, 1),
    ],
)
def test_sizes_out_of_range_are_refused(kernel_file, sizes):
    kernel = KernelLibrary(kernel_file, "l2")
    with pytest.raises(BackendError, match=rf"num_kept={sizes.num_kept}.*invalid argument"):
        kernel.enqueue(Addresses(0, 0, 0, 0, 0, 0), sizes, 0, 0)


def test_the_workspace_of_the_largest_sizes_serves_all_smaller_ones(kernel_file):
    kernel = KernelLibrary(kernel_file, "l2")
    for seq_len in (1, 512, 513, 32_768, 32_769, 65_536, 100_000):
        size = kernel.workspace_bytes(Sizes(2, 28, seq_len, 1))
        assert size <= kernel.workspace_bytes(Sizes(2, 28, seq_len + 1, 1))
        assert size <= kernel.workspace_bytes(Sizes(3, 28, seq_len, 1))


def test_an_unknown_normalization_is_refused(kernel_file):
    with pytest.raises(InvalidInput, match="expected one of l2, softmax, minmax"):
        KernelLibrary(kernel_file, "l1")


def test_a_missing_compiler_is_an_error(tmp_path):
    with pytest.raises(BackendError, match="apt install"):
        on_cpu.compile_for_cpu(tmp_path, compiler="no-such-compiler")


def test_the_plugin_has_the_names_of_the_exported_node():
    source = (on_cpu.FOLDER / "weighted_topk_plugin.cpp").read_text()
    assert f'kName = "{node.NAME}"' in source
    table = re.search(r"kBindings\[.*?\] = \{(.*?)\n\};", source, re.DOTALL)
    assert tuple(re.findall(r'\{"(\w+)"', table[1])) == node.INPUTS + node.OUTPUTS
    names = re.search(r"kNormalizations\[\] = \{(.*?)\}", source)
    assert tuple(re.findall(r'"(\w+)"', names[1])) == NORMALIZATIONS
    attributes = {
        attribute.name: attribute.s.decode() for attribute in node.build_function("portable", "l2").attribute_proto
    }
    assert f'kVersion = "{attributes["plugin_version"]}"' in source
    assert f'kNamespace = "{attributes["plugin_namespace"]}"' in source
    assert 'kNormalizationField = "normalization"' in source and "normalization" in attributes


_BARRIERS = ("__syncthreads();", "__syncwarp(kAllLanes);")


def places_of_barriers():
    for file in ("weighted_topk_kernel.cu", "row_selection.cuh"):
        text = (on_cpu.FOLDER / file).read_text()
        for barrier in _BARRIERS:
            for match in re.finditer(re.escape(barrier), text):
                if text[: match.start()].rstrip().endswith("__threadfence();"):
                    continue  # it orders what blocks that run at once see, and here they run one by one
                yield pytest.param(
                    file, match.start(), len(barrier), id=f"{file}:{text.count(chr(10), 0, match.start()) + 1}"
                )


@pytest.mark.slow
@pytest.mark.parametrize(("file", "start", "length"), list(places_of_barriers()))
def test_every_barrier_is_needed_and_its_absence_seen(tmp_path, file, start, length):
    folder = tmp_path / "kernel"
    shutil.copytree(on_cpu.FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    text = (folder / file).read_text()
    (folder / file).write_text(text[:start] + ";" + text[start + length :])
    library = on_cpu.compile_for_cpu(tmp_path / "cache", sources=folder)
    # a process of its own: the emulation ends it where threads wait for ever
    trial = subprocess.run(
        [sys.executable, "-c", f"import test_plugin_kernel as t; t.try_many_schedules({str(library)!r})"],
        cwd=on_cpu.FOLDER.parent,
        env={"PYTHONPATH": ".:tests:tests/plugins"},
        capture_output=True,
        check=False,
    )
    assert trial.returncode != 0


def try_many_schedules(library):
    from pathlib import Path

    for schedule in range(12):
        for seq_len in (400, 512, 2000):
            for ties in (False, True):
                case = random_case(schedule, Sizes(2, 5, seq_len, seq_len // 3), ties=ties)
                kept, scores = run(KernelLibrary(Path(library), "l2"), case, schedule=schedule)
                assert disagreement(case, "l2", kept, scores) is None
