"""A peer: its process, started in its environment over a model that it can load, asked and stopped."""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.peers.worker import Answer, Ask

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Peer:
    """What to start."""

    name: str  # for the table
    module: str  # of benchmarks.peers that it runs
    environment: str  # folder of its virtual environment, below those of all
    model: str = "bundle"  # folder that it loads, below the models' own
    defaults: bool = False  # leave the precision of the arithmetic to the peer
    variables: Mapping[str, str] = field(default_factory=dict)  # of the process's environment


_OPENVINO = ("openvino", "openvino")
PEERS = (
    Peer("hawk_trt", "hawk_trt", "hawk_trt"),
    Peer("hawk_trt, int8", "hawk_trt", "hawk_trt", "bundle-int8"),
    Peer("transformers", "transformers", "transformers"),
    Peer("OpenVINO GenAI", *_OPENVINO, "openvino"),
    Peer("OpenVINO GenAI, whole kernel", *_OPENVINO, "openvino", variables={"CDPRUNER_SPLIT_THRESHOLD": "0"}),
    Peer("OpenVINO GenAI, int8, defaults", *_OPENVINO, "openvino-int8", defaults=True),
    Peer("onnxruntime-genai", "onnxruntime_genai", "onnxruntime-genai", "genai"),
)
# What turns the checkpoint into the model of a peer: a command of its environment.
_OPTIMUM = "bin/optimum-cli export openvino -m {checkpoint} --task image-text-to-text --weight-format"
_CONVERSIONS = {
    "openvino": f"{_OPTIMUM} fp32 {{out}}",
    "openvino-int8": f"{_OPTIMUM} int8 {{out}}",
    "genai": "bin/python -m benchmarks.peers.mobius {checkpoint} {out}",
}


@dataclass(frozen=True)
class Setting:
    """What all peers get."""

    models: Path  # folder with `checkpoint`, `bundle`, `bundle-int8` and, once converted, the other peers' models
    environments: Path  # folder of the virtual environments
    threads: int  # of each peer


class Process:
    """A peer that runs, or what kept it from it."""

    def __init__(self, peer: Peer, setting: Setting) -> None:
        self.versions: dict[str, str] = {}  # of its packages
        self.failure: str | None = None  # why it does not run, None where it does
        self._popen: subprocess.Popen[str] | None = None
        self._log = setting.models / f"{peer.name}.log"
        environment, model = setting.environments / peer.environment, setting.models / peer.model
        if not (environment / "bin" / "python").is_file():
            self.failure = f"no environment {environment}: make peers"
            return
        with self._log.open("w") as err:
            if not _convert(environment, setting.models / "checkpoint", model, err.fileno()):
                self.failure = f"could not convert the model: {self._last_line()}"
                return
            command = [str(environment / "bin" / "python"), "-m", f"benchmarks.peers.{peer.module}"]
            command += ["--model", str(model), "--threads", str(setting.threads), *["--defaults"] * peer.defaults]
            variables = {"OMP_NUM_THREADS": str(setting.threads), "PYTHONPATH": str(ROOT), **peer.variables}
            pipe = subprocess.PIPE
            self._popen = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=err, text=True, cwd=ROOT, env=os.environ | variables
            )
        line = self._read()
        if line:
            self.versions = json.loads(line)
        else:
            self._fail("could not start")

    def ask(self, ask: Ask) -> Answer | None:
        """One answer; None where it does not run, or not any more."""
        if self._popen is None or self._popen.stdin is None:
            return None
        print(json.dumps(asdict(ask)), file=self._popen.stdin, flush=True)
        line = self._read()
        if not line:
            self._fail("died")
            return None
        return Answer(**json.loads(line))

    def stop(self) -> float:
        """End it; the most memory that was resident, Linux's VmHWM, in MB (0 where it does not run)."""
        if self._popen is None or self._popen.stdin is None:
            return 0.0
        status = Path(f"/proc/{self._popen.pid}/status").read_text().splitlines()
        peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        self._popen.stdin.close()
        self._popen.wait()
        return peak / 1024

    def _read(self) -> str:
        assert self._popen is not None and self._popen.stdout is not None
        return self._popen.stdout.readline()

    def _fail(self, why: str) -> None:
        assert self._popen is not None
        self._popen.wait()
        self.failure, self._popen = f"{why}: {self._last_line()}", None

    def _last_line(self) -> str:
        """What the peer said last."""
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return f"{lines[-1][:200] if lines else 'it said nothing'} ({self._log.name})"


def _convert(environment: Path, checkpoint: Path, out: Path, err: int) -> bool:
    """Make the peer's model where it is not there; a failed try leaves none."""
    if out.is_dir():
        return True
    partial = out.with_name(f"{out.name}.partial")
    program, *words = (word.format(checkpoint=checkpoint, out=partial) for word in _CONVERSIONS[out.name].split())
    if subprocess.run([environment / program, *words], stdout=err, stderr=err).returncode != 0:
        return False
    partial.rename(out)
    return True
