"""What an export replaces, and that nothing is lost when it is killed, interrupted or out of disk."""

import errno
import os
import resource
import shutil
import subprocess
import sys

import pytest
from test_export import assert_one_line_error, run

from checkpoints import TINY, Sizes, make_checkpoint, make_sparse_checkpoint
from export.__main__ import main
from export.writer import ExportOptions, export
from hawk_trt.bundle import MANIFEST, Bundle
from hawk_trt.errors import BundleError


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_nothing_but_a_bundle_is_ever_replaced(tmp_path, tensors):
    folder = make_checkpoint(tmp_path / "model", tensors)
    photos = tmp_path / "photos"
    photos.mkdir()
    export(folder, photos)  # an empty folder will do
    (photos / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"photos: holds notes\.txt, which no export wrote"):
        export(folder, photos, ExportOptions(force=True))
    (photos / MANIFEST).unlink()
    with pytest.raises(BundleError, match="holds"):
        export(folder, photos)
    assert (photos / "notes.txt").read_text() == "mine"
    with pytest.raises(BundleError, match="holds the checkpoint"):
        export(folder, folder)
    with pytest.raises(BundleError, match="holds the checkpoint"):
        export(folder, tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match="a file, expected a folder"):
        export(folder, tmp_path / "file")


def test_a_symbolic_link_at_out_keeps_pointing_at_the_bundle(tmp_path, checkpoint):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for dtype in ("float32", "float16"):
        export(checkpoint, tmp_path / "out", ExportOptions(dtype=dtype))
        assert (tmp_path / "out").is_symlink()
        assert Bundle.load(tmp_path / "out").manifest.dtype == dtype
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_a_full_disk_leaves_the_older_bundle_and_nothing_else(tmp_path, checkpoint, capsys):
    out = tmp_path / "out"
    export(checkpoint, out)
    before = contents(out)
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 20_000, len(before["decoder.data"]) // 4):  # at the first file, in a graph, in the weights
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            status = main([str(checkpoint), "--out", str(out), "--dtype", "float16"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert status == 1
        error = capsys.readouterr().err
        assert os.strerror(errno.EFBIG) in error
        told = [line for line in error.splitlines() if "of weights" not in line]  # a busy machine tells of progress
        assert len(told) <= 2
        assert contents(out) == before
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bundle_larger_than_the_free_space_is_refused_before_it_is_begun(tmp_path):
    free_bytes = shutil.disk_usage(tmp_path).free
    vocab_size = free_bytes // (TINY.hidden_size * 4) + 1
    try:
        folder = make_sparse_checkpoint(tmp_path / "model", Sizes(vocab_size=vocab_size), shards=1)
    except OSError as error:
        pytest.skip(f"the file system holds no sparse file of this size: {error}")
    with pytest.raises(BundleError, match=r"GB free, the bundle needs .* GB"):
        export(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Exports again and again in forked children, each killed at its n-th file operation, until one survives them all.
_KILLED = """
import os, signal, sys
from pathlib import Path
from export.writer import ExportOptions, export
from hawk_trt.bundle import Bundle
checkpoint, out, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
older = Bundle.load(out).manifest.dtype
newer = "float16" if older == "float32" else "float32"
outcomes, operation = [], 1
while True:
    child = os.fork()
    if child == 0:
        seen = 0
        def count(event, arguments):
            global seen
            here = event in ("open", "os.mkdir", "os.rename") and str(out.parent) in str(arguments[0])
            if here or event in ("ctypes.dlsym", "os.remove", "os.rmdir"):
                seen += 1
                if seen == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        export(checkpoint, out, ExportOptions(dtype=newer, targets=("cpu",)))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    outcomes.append(Bundle.load(out, verify=True).manifest.dtype)
    if not os.WIFSIGNALED(status):
        break
    if outcomes[-1] == newer:
        older, newer = newer, older
    operation += step
assert os.waitstatus_to_exitcode(status) == 0, status
print(len(outcomes), outcomes[-1] == newer, sorted(path.name for path in out.parent.iterdir()))
"""


def test_an_export_killed_at_any_file_operation_leaves_a_whole_bundle(tmp_path, checkpoint):
    export(checkpoint, tmp_path / "out")
    finished = run("-c", _KILLED, checkpoint, tmp_path / "out", 3)
    assert finished.returncode == 0, finished.stderr
    count, survived, left = finished.stdout.split(maxsplit=2)
    assert int(count) > 10
    assert survived == "True"
    assert left.strip() == "['out']"


def test_an_interrupted_export_cleans_up_and_exits_130(tmp_path, checkpoint):
    out = tmp_path / "out"
    export(checkpoint, out)
    before = contents(out)
    script = (
        "import os, signal, sys\n"
        "from export.__main__ import main\n"
        "def interrupt(event, arguments):\n"
        "    if event == 'open' and str(arguments[0]).endswith('decoder.data'):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs it behind its back\n"
        "sys.addaudithook(interrupt)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    finished = run("-c", script, checkpoint, "--out", out, "--force")
    assert_one_line_error(finished, "interrupted", status=130)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_killed_exports_left_is_removed_and_what_they_moved_aside_put_back(tmp_path, checkpoint):
    out = tmp_path / "out"
    export(checkpoint, out)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    out.rename(tmp_path / f".out.previous-{gone.pid}")
    (tmp_path / f".out.partial-{gone.pid}").mkdir()
    alive = tmp_path / f".out.partial-{os.getppid()}"
    alive.mkdir()
    (tmp_path / f".outer.partial-{gone.pid}").mkdir()
    inode = (tmp_path / f".out.previous-{gone.pid}").stat().st_ino
    export(checkpoint, out)
    assert out.stat().st_ino == inode, "the bundle that was moved aside is up to date, so it is not written again"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", alive.name, f".outer.partial-{gone.pid}"])


def test_a_file_system_that_cannot_swap_folders_still_gets_the_new_bundle(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("hawk_trt.files.staging._exchange", lambda *folders: not folders)
    for dtype in ("float32", "float16"):
        export(checkpoint, tmp_path / "out", ExportOptions(dtype=dtype))
    assert Bundle.load(tmp_path / "out", verify=True).manifest.dtype == "float16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
