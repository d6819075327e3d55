"""The application on Ray Serve, with real replicas that are killed and replaced under load: `make check-serving`."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import openai
import pytest
import yaml

from export.__main__ import main as export
from hawk_trt import Pipeline
from hawk_trt.request import PruningConfig
from serving import MODEL, question, samples, wait_for

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[3]
UPDATE = """
import sys, ray
from ray import serve
from hawk_trt.apps.serve.ray_app import build
ray.init(address=sys.argv[1], log_to_driver=False)
arguments = {"path": sys.argv[2], "model_name": sys.argv[3], "keep_ratio": 0.2, "max_batch": 3}
serve.run(build(arguments), name="hawk")
print(ray.nodes()[0]["MetricsExportPort"])
"""
CLIENTS = 6
SECONDS = 300.0


class Cluster:
    """`serve run` of the shipped config file, changed to fit this machine; and the processes that came of it."""

    def __init__(self, bundle, folder):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = yaml.safe_load((ROOT / "examples" / "serve.yaml").read_text(encoding="utf-8"))
        self.config["http_options"] |= {"host": "127.0.0.1", "port": self.port, "request_timeout_s": 60}
        (application,) = self.config["applications"]
        application["args"] = {"path": str(bundle), "model_name": MODEL, "keep_ratio": 0.2, "max_batch": 2}
        (deployment,) = application["deployments"]
        deployment["ray_actor_options"] = {"num_gpus": 0, "num_cpus": 0.25}
        deployment["autoscaling_config"] |= {"max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 1}
        file = folder / "serve.yaml"
        file.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        self._mark = f"HAWK_TEST={uuid.uuid4().hex}"
        self.environ = environ = os.environ | {
            "HAWK_TEST": self._mark.partition("=")[2],
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        environ.pop("RAY_ADDRESS", None)
        self.log = folder / "serve.log"
        command = [Path(sys.executable).parent / "serve", "run", file]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environ, stdout=log, stderr=log)
        self.http = httpx2.Client(base_url=self.url, timeout=60, trust_env=False)

    def is_ready(self):
        assert self.process.poll() is None, self.log.read_text()[-4000:]
        try:
            return self.http.get("/ready").status_code == 200
        except httpx2.TransportError:
            return False

    def replicas(self):
        """The processes of the replicas."""
        return {number for number, words in self.processes() if words[0].startswith(b"ray::ServeReplica:hawk:hawk")}

    def address(self):
        """Of the cluster, as ray.init takes it."""
        prefix = b"--gcs-address="
        return next(word[len(prefix) :].decode() for _, words in self.processes() for word in words if prefix in word)

    def processes(self):
        """Number and words of the processes of this cluster, known by what it was started with."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ, title = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            except OSError:  # it ended meanwhile, or is not ours
                continue
            if self._mark.encode() in environ.split(b"\0"):
                yield int(folder.name), title.split(b"\0")

    def openai(self, retries):
        """The official client."""
        http = httpx2.Client(trust_env=False)
        address = f"{self.url}/v1"
        return openai.OpenAI(base_url=address, api_key="none", max_retries=retries, timeout=45, http_client=http)

    def close(self):
        self.http.close()
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        finally:
            self.process.kill()


@dataclass
class Load:
    """What clients asked and heard until they were stopped.

    answered: right answers.  errors: what was told instead, each asked again.  wrong: other answers.
    slowest: seconds of the slowest request.
    """

    answered: int = 0
    errors: list = field(default_factory=list)
    wrong: list = field(default_factory=list)
    slowest: float = 0.0


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def endless_bundle(tiny_checkpoint, tmp_path_factory):
    """The tiny model without what ends an answer, so that streams last."""
    folder = tmp_path_factory.mktemp("endless")
    shutil.copytree(tiny_checkpoint, folder / "checkpoint")
    for name, key in (
        ("generation_config", "eos_token_id"),
        ("config", "eos_token_id"),
        ("tokenizer_config", "eos_token"),
    ):
        file = folder / "checkpoint" / f"{name}.json"
        fields = json.loads(file.read_text())
        for part in (fields, fields.get("text_config", {})):
            part.pop(key, None)
        file.write_text(json.dumps(fields))
    assert export([str(folder / "checkpoint"), "--out", str(folder / "bundle")]) == 0
    return folder / "bundle"


@pytest.fixture(scope="module")
def cluster(endless_bundle, tmp_path_factory):
    running = Cluster(endless_bundle, tmp_path_factory.mktemp("ray"))
    try:
        wait_for(running.is_ready, 180)
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def expected(endless_bundle):
    """Picture, question and offline answer."""
    pruning = PruningConfig(keep_ratio=0.2)
    with Pipeline.load(endless_bundle, threads=1) as pipe:
        return [
            (picture, text, pipe.generate(text, [picture], pruning=pruning, max_new_tokens=8).text)
            for picture, text, _ in samples()
        ]


def answer_of(client, body, on_chunk=lambda: None):
    if not body.get("stream"):
        return client.chat.completions.create(**body).choices[0].message.content
    with client.chat.completions.create(**body) as chunks:
        seen = []
        for chunk in chunks:
            seen.append(chunk)
            on_chunk()
    assert seen[-1].choices[0].finish_reason, "a stream that ends without a reason is a broken one"
    return "".join(chunk.choices[0].delta.content or "" for chunk in seen)


def ask_until(stopped, cluster, expected, load, lock, number, retries):
    with cluster.openai(retries) as client:
        turn = number
        while not stopped.is_set():
            picture, text, right = expected[turn % len(expected)]
            begun = time.monotonic()
            try:
                got = answer_of(client, question(text, picture, stream=turn % 2 == 0))
            except (openai.APIError, httpx2.TransportError, AssertionError) as error:
                with lock:
                    load.errors.append(f"{type(error).__name__}: {error}"[:200])
                    load.slowest = max(load.slowest, time.monotonic() - begun)
                continue  # the same question again, so none is lost
            with lock:
                load.answered += got == right
                load.slowest = max(load.slowest, time.monotonic() - begun)
                if got != right:
                    load.wrong.append((text, got))
            turn += 1


@contextmanager
def under_load(cluster, expected, retries=0):
    """Clients that ask without a pause; what they heard is complete at the end."""
    load, stopped, lock = Load(), threading.Event(), threading.Lock()
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [
            pool.submit(ask_until, stopped, cluster, expected, load, lock, number, retries) for number in range(CLIENTS)
        ]
        try:
            yield load
        finally:
            stopped.set()
        for one in asked:
            one.result(SECONDS)
    print(f"\n{load.answered} answered, slowest {load.slowest:.1f} s, {len(load.errors)} errors: {set(load.errors)}")


def test_the_app_is_the_same_as_without_ray(cluster, expected):
    picture, text, right = expected[0]
    told = cluster.http.post("/v1/chat/completions", json=question(text, picture, hawk={"details": True})).json()
    assert told["choices"][0]["message"]["content"] == right
    assert told["usage"]["kept_visual_tokens"] == sum(len(image["kept"]) for image in told["hawk"]["images"]) == 13
    with cluster.http.stream("POST", "/v1/chat/completions", json=question(text, picture, stream=True)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert list(response.iter_lines())[-2:] == ["data: [DONE]", ""]
    refused = cluster.http.post("/v1/chat/completions", json=question(text, n=9))
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert cluster.http.get("/").headers["content-security-policy"].startswith("default-src 'self'")


def test_load_brings_a_second_replica_and_killed_ones_are_replaced_with_nothing_lost(cluster, expected):
    wait_for(lambda: len(cluster.replicas()) == 1)
    with under_load(cluster, expected) as load:
        wait_for(lambda: len(cluster.replicas()) == 2, 90)
        wait_for(lambda: load.answered > 100, SECONDS)
        killed = set()
        for _ in range(2):
            (victim, *_) = cluster.replicas() - killed
            killed.add(victim)
            before = load.answered
            os.kill(victim, signal.SIGKILL)
            wait_for(lambda: len(cluster.replicas() - killed) == 2, 90)
            wait_for(lambda before=before: load.answered > before + 100, SECONDS)
    assert not load.wrong
    assert load.slowest < 45, "a client hung"
    assert len(load.errors) <= 4 * CLIENTS, load.errors
    assert all(error.startswith(("InternalServerError", "APIConnectionError", "RemoteProtocolError", "APIError",
                                 "AssertionError")) for error in load.errors), load.errors  # fmt: skip


def test_clients_that_try_again_by_themselves_hear_of_a_killed_replica_only_in_a_broken_stream(cluster, expected):
    with under_load(cluster, expected, retries=5) as load:
        wait_for(lambda: load.answered > 50, SECONDS)
        os.kill(min(cluster.replicas()), signal.SIGKILL)
        before = load.answered
        wait_for(lambda: load.answered > before + 200, SECONDS)
    assert not load.wrong
    assert load.slowest < 45
    print(load.errors)


@pytest.mark.parametrize("stream", [False, True])
def test_who_waits_for_a_replica_that_is_killed_is_told_so_at_once(cluster, stream):
    wait_for(cluster.is_ready)
    body = question("Say anything.", max_tokens=1000, stream=stream)
    with cluster.openai(retries=0) as client, ThreadPoolExecutor(1) as other:
        begun = threading.Event()
        answer = other.submit(answer_of, client, body, begun.set)
        begun.wait(1 if stream else 0.3)
        for replica in cluster.replicas():
            os.kill(replica, signal.SIGKILL)
        with pytest.raises((openai.APIError, httpx2.TransportError)) as told:
            answer.result(30)
    print(f"\nstream={stream}, begun={begun.is_set()}: {told.type.__name__}: {told.value}")
    assert begun.is_set() == stream
    with cluster.openai(retries=5) as client:
        answer_of(client, question("Say anything."))


def test_an_update_under_load_drains_the_old_replicas_and_loses_nothing(cluster, expected, endless_bundle):
    old = cluster.replicas()
    with under_load(cluster, expected) as load:
        wait_for(lambda: load.answered > 50, SECONDS)
        update = [sys.executable, "-c", UPDATE, cluster.address(), endless_bundle, MODEL]
        done = subprocess.run(update, env=cluster.environ, capture_output=True, text=True, timeout=180, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        wait_for(lambda: cluster.replicas() and not cluster.replicas() & old, 90)
        before = load.answered
        wait_for(lambda: load.answered > before + 100, SECONDS)
    assert (load.errors, load.wrong) == ([], [])
    with httpx2.Client(trust_env=False, timeout=30) as client:
        address = f"http://{cluster.address().rpartition(':')[0]}:{done.stdout.split()[-1]}/metrics"
        wait_for(lambda: "ray_hawk_requests_total{" in client.get(address).text, 60)
        text = client.get(address).text
    kept = [line for line in text.splitlines() if line.startswith("ray_hawk_tokens_total{") and "kept_visual" in line]
    assert kept and all('deployment="hawk"' in line and "replica=" in line for line in kept)
    assert "ray_hawk_first_token_seconds_bucket{" in text
    assert "ray_serve_" in text
