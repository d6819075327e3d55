"""Result logs: what a killed run or a full disk leaves behind is whole, and the next run goes on with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hawk_trt.apps.evaluate.result_log import ResultLog
from hawk_trt.apps.evaluate.trials import Trial
from hawk_trt.errors import InvalidInput


def trial(number):
    return Trial(str(number), "hawk", 0.1, "héllo\n", 1.0, 64, 7, 2, 1000, None)


def test_a_log_goes_on_behind_a_line_that_was_cut_short(tmp_path):
    path, subject = tmp_path / "new" / "results.jsonl", {"bundle": "a", "dataset": "b"}
    log = ResultLog(path, subject, Trial)
    for number in range(3):
        log.append(trial(number))
    log.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        again = ResultLog(path, subject, Trial)
        assert again.records == [trial(n) for n in range(max(0, whole[:cut].count(b"\n") - 1))]
        again.append(trial(9))
        again.close()
        last = ResultLog(path, subject, Trial)
        assert last.records == [*again.records]
        last.close()


def test_a_log_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "results.jsonl"
    ResultLog(path, {"bundle": "a"}, Trial).close()
    for subject in ({"bundle": "b"}, {"bundle": "a", "dataset": "c"}):
        with pytest.raises(InvalidInput, match=r"it holds results of another (bundle|dataset).* Choose another --out"):
            ResultLog(path, subject, Trial)
    assert path.read_text() == '{"bundle":"a"}\n'
    for content, message in (("hello\n", "not a file of results"), ('{"bundle":"a"}\n{}\n', "damaged")):
        path.write_text(content)
        with pytest.raises(InvalidInput, match=message):
            ResultLog(path, {"bundle": "a"}, Trial)
        assert path.read_text() == content


def test_one_log_at_a_time_holds_a_file(tmp_path):
    path, subject = tmp_path / "results.jsonl", {"bundle": "a"}
    log = ResultLog(path, subject, Trial)
    log.append(trial(0))
    held = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"half a li')  # what the holder is writing just now
    with pytest.raises(InvalidInput, match=r"another run is writing there. Wait for it, or choose another --work"):
        ResultLog(path, subject, Trial, option="--work")
    assert path.read_bytes() == held + b'{"half a li'
    log.close()
    again = ResultLog(path, subject, Trial)
    assert again.records == [trial(0)]
    again.close()


def test_a_result_that_the_disk_takes_in_parts_is_whole(tmp_path, monkeypatch):
    path, write = tmp_path / "results.jsonl", os.write
    log = ResultLog(path, {"bundle": "a"}, Trial)
    monkeypatch.setattr("hawk_trt.apps.evaluate.result_log.os.write", lambda file, line: write(file, line[:7]))
    for number in range(3):
        log.append(trial(number))
    log.close()
    monkeypatch.undo()
    again = ResultLog(path, {"bundle": "a"}, Trial)
    assert again.records == [trial(number) for number in range(3)]
    again.close()


@pytest.mark.parametrize("sync", [False, True])
def test_a_result_that_the_disk_does_not_take_is_an_error_and_leaves_no_torn_line(tmp_path, sync):
    path = tmp_path / "results.jsonl"
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from hawk_trt.apps.evaluate.result_log import ResultLog\n"
        "path = Path(sys.argv[1])\n"
        f"log = ResultLog(path, {{'bundle': 'a'}}, dict[str, str], sync={sync})\n"
        "log.append({'a': 'b' * 50})\n"
        "size = path.stat().st_size\n"
        "limit = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limit[1]))\n"
        "try:\n    log.append({'a': 'c' * 50})\n"
        "except Exception as error: print(type(error).__name__, error)\n"
        "assert path.stat().st_size == size and len(log.records) == 1\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, limit)\n"
        "log.append({'a': 'd' * 50})\n"
        "log.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"InvalidInput {path}: cannot be written (File too large)")
    log = ResultLog(path, {"bundle": "a"}, dict[str, str])
    assert [record["a"][0] for record in log.records] == ["b", "d"]
    log.close()


def test_a_place_that_cannot_hold_a_log_is_an_error_with_its_path(tmp_path):
    (tmp_path / "results.jsonl").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "results.jsonl", tmp_path / "file" / "results.jsonl", Path("/proc/none/results.jsonl")):
        with pytest.raises(InvalidInput, match=f"{path}: cannot be written"):
            ResultLog(path, {"bundle": "a"}, Trial)
