"""A peer: its process, started in its environment over a model that it can load, asked and stopped."""

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.peers.worker import Answer, Ask

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Peer:
    """What to start.

    Attributes:
        name: for the table.
        module: of benchmarks.peers that it runs.
        environment: folder of its virtual environment, below those of all.
        model: folder that it loads, below the models' own.
        compiled: whether to pass --compiled.
    """

    name: str
    module: str
    environment: str
    model: str = "bundle"
    compiled: bool = False


PEERS = (
    Peer("hawk_trt", "hawk_trt", "hawk_trt"),
    Peer("transformers", "transformers", "transformers"),
    Peer("transformers, compiled", "transformers", "transformers", compiled=True),
    Peer("OpenVINO GenAI", "openvino", "openvino", "openvino"),
    Peer("onnxruntime-genai", "onnxruntime_genai", "onnxruntime-genai", "genai"),
)
# What turns the checkpoint into the model of a peer: a command of its environment.
_CONVERSIONS = {
    "openvino": "bin/optimum-cli export openvino -m {checkpoint} --task image-text-to-text --weight-format fp32 {out}",
    "genai": "bin/python -m onnxruntime_genai.models.builder -i {checkpoint} -o {out} -p fp32 -e cpu -c {out}-cache",
}


@dataclass(frozen=True)
class Setting:
    """What all peers get.

    Attributes:
        models: folder with `checkpoint`, `bundle` and, once converted, the other peers' models.
        environments: folder of the virtual environments.
        image, prompt: what is asked.
        threads: of each peer.
    """

    models: Path
    environments: Path
    image: Path
    prompt: str
    threads: int


class Process:
    """A peer that runs, or what kept it from it.

    Attributes:
        versions: of its packages.
        failure: why it does not run, None where it does.
    """

    def __init__(self, peer: Peer, setting: Setting) -> None:
        self.versions: dict[str, str] = {}
        self.failure: str | None = None
        self._popen: subprocess.Popen[str] | None = None
        log = setting.models / f"{peer.name}.log"
        environment = setting.environments / peer.environment
        if not (environment / "bin" / "python").is_file():
            self.failure = f"no environment {environment}: make peers"
            return
        model = setting.models / peer.model
        with log.open("w") as err:
            if not _convert(environment, setting.models / "checkpoint", model, err.fileno()):
                self.failure = f"could not convert the model: {_last_line(log)} ({log})"
                return
            self._popen = _start(peer, setting, environment, model, err.fileno())
        line = self._read()
        if line:
            self.versions = json.loads(line)
        else:
            self._fail(f"could not start: {_last_line(log)} ({log})")
        self._log = log

    def ask(self, ask: Ask) -> Answer | None:
        """One answer; None where it does not run, or not any more."""
        if self._popen is None or self._popen.stdin is None:
            return None
        print(json.dumps(asdict(ask)), file=self._popen.stdin, flush=True)
        line = self._read()
        if not line:
            self._fail(f"died: {_last_line(self._log)} ({self._log})")
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
        self.failure, self._popen = why, None


def _convert(environment: Path, checkpoint: Path, out: Path, err: int) -> bool:
    """Make the peer's model where it is not there; a failed try leaves none."""
    if out.is_dir():
        return True
    partial = out.with_suffix(".partial")
    program, *words = (word.format(checkpoint=checkpoint, out=partial) for word in _CONVERSIONS[out.name].split())
    if subprocess.run([environment / program, *words], stdout=err, stderr=err).returncode != 0:
        return False
    partial.rename(out)
    return True


def _start(peer: Peer, setting: Setting, environment: Path, model: Path, err: int) -> "subprocess.Popen[str]":
    command = [str(environment / "bin" / "python"), "-m", f"benchmarks.peers.{peer.module}"]
    command += ["--model", str(model), "--image", str(setting.image), "--prompt", setting.prompt]
    command += ["--threads", str(setting.threads), *["--compiled"] * peer.compiled]
    variables = os.environ | {"OMP_NUM_THREADS": str(setting.threads), "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=err, text=True, cwd=ROOT, env=variables)


def _last_line(log: Path) -> str:
    """What a peer said last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"
