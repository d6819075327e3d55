import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hawk_trt.apps.cli import doctor
from hawk_trt.apps.cli.doctor import Gpu, examine, parse_gpus, provider_problem
from hawk_trt.apps.cli.extras import extras
from hawk_trt.runtime.versions import at_least

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[3]
ABSENT = dict.fromkeys((*extras()[""], *doctor.ONNX_RUNTIMES, *doctor.TENSORRTS))


PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_doctor_reads_the_extras_from_the_metadata(monkeypatch):
    declared = {"": PYPROJECT["dependencies"], **PYPROJECT["optional-dependencies"]}
    lines = [f"{one}; extra == '{extra}'" if extra else one for extra, needed in declared.items() for one in needed]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lines if name == "hawk-trt" else [])
    found = extras()
    assert {"", "cpu", "cuda", "tensorrt", *doctor.EXTRAS} <= set(found)
    for extra, packages in found.items():
        assert packages == dict(re.findall(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", " ".join(declared[extra])))
    assert set(found["cpu"]) | set(found["cuda"]) == set(doctor.ONNX_RUNTIMES)


def test_doctor_suggests_the_extra_that_brings_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "installed_version", lambda _: None)
    monkeypatch.setattr(doctor, "_providers", lambda: ((), "onnxruntime is not installed"))
    monkeypatch.setattr(doctor, "find_gpus", lambda: (Gpu("A GPU", "9.0", "580", 10, 9),))
    report = examine()
    assert not any(capability.works for capability in report.capabilities)
    suggested = {(capability.command or "").rpartition("pip install ")[2] for capability in report.capabilities}
    assert {f"'hawk-trt[{extra}]'" for extra in ("cpu", "cuda", *doctor.EXTRAS)} <= suggested


def test_the_cpu_provider_computes_here():
    assert provider_problem("CPUExecutionProvider") is None
    assert all(one.works for one in examine().capabilities if one.name == "run on CPU")


def test_a_provider_that_is_not_there_is_no_crash():
    assert provider_problem("NoSuchExecutionProvider") == "this onnxruntime has no NoSuchExecutionProvider"


def test_both_onnxruntime_packages_are_removed_before_the_cuda_one_is_installed():
    packages = ABSENT | {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    gpu = Gpu("A GPU", "9.0", "580", 10, 9)
    capability = doctor._cuda("1.31.1", packages, ("CPUExecutionProvider",), (gpu,), None)
    assert not capability.works
    assert capability.command == "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'hawk-trt[cuda]'"


def test_a_package_that_is_too_old_is_missing():
    installed = {"huggingface_hub": "1.2", "safetensors": "0.4.3", "torch": "2.13.0+cpu", "transformers": "4.52.0"}
    capability = doctor._extra("parity", {"torch": "2.6", "transformers": "5.0"}, installed)
    assert not capability.works
    assert capability.detail == "transformers 4.52.0 is older than 5.0"


@pytest.mark.parametrize(
    ("found", "lowest", "reached"),
    [("2.13.0+cpu", "2.6", True), ("2.6.0", "2.6", True), ("1.9", "1.19", False), ("5.0.0rc1", "5.0", True)],
)
def test_versions_are_compared_by_number(found, lowest, reached):
    assert at_least(found, lowest) is reached


def test_gpus_are_read_with_and_without_their_own_memory():
    listing = "NVIDIA H200, 9.0, 580.65.06, 143771, 143100\nOrin (nvgpu), 8.7, 540.4.0, [N/A], [N/A]\n"
    assert parse_gpus(listing) == (
        Gpu("NVIDIA H200", "9.0", "580.65.06", 143771, 143100),
        Gpu("Orin (nvgpu)", "8.7", "540.4.0", None, None),
    )
    assert parse_gpus("No devices were found\n") == ()


def test_doctor_prints_findings_and_imports_neither_torch_nor_transformers():
    script = (
        "import sys; from hawk_trt.apps.cli.main import main; code = main(['doctor', '--json']); "
        "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert {"run on CPU", "run on CUDA", "export", "parity", "eval", "serve", "video", "TensorRT"} == {
        capability["name"] for capability in findings["capabilities"]
    }
    assert findings["disk_free_bytes"] > 0
