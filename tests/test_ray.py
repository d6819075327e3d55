"""The application on Ray Serve, with real replicas that are killed and replaced under load: `make check-serving`."""

import os
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

from hawk_trt import Pipeline
from hawk_trt.config import PruningConfig
from serving import MODEL, question, samples, wait_for

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parent.parent
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
        environ = os.environ | {
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
        """The processes of the replicas: those of this cluster, by what it was started with."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environ, title = (folder / "environ").read_bytes(), (folder / "cmdline").read_bytes()
            except OSError:  # it ended meanwhile, or is not ours
                continue
            if self._mark.encode() in environ.split(b"\0") and title.startswith(b"ray::ServeReplica:hawk:hawk"):
                found.add(int(folder.name))
        return found

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
def cluster(tiny_bundle, tmp_path_factory):
    running = Cluster(tiny_bundle, tmp_path_factory.mktemp("ray"))
    try:
        wait_for(running.is_ready, 180)
        yield running
    finally:
        running.close()


@pytest.fixture(scope="module")
def expected(tiny_bundle):
    """Picture, question and offline answer."""
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        return [
            (
                picture,
                text,
                pipe.generate(text, [picture], pruning=PruningConfig(keep_ratio=0.2), max_new_tokens=8).text,
            )
            for picture, text, _ in samples()
        ]


def answer_of(client, body):
    if not body.get("stream"):
        return client.chat.completions.create(**body).choices[0].message.content
    with client.chat.completions.create(**body) as chunks:
        seen = list(chunks)
    assert seen[-1].choices[0].finish_reason, "a stream that ends without a reason is a broken one"
    return "".join(chunk.choices[0].delta.content or "" for chunk in seen)


def ask_until(stopped, cluster, expected, load, lock, number, retries):
    http = httpx2.Client(trust_env=False)
    with openai.OpenAI(
        base_url=f"{cluster.url}/v1", api_key="none", max_retries=retries, timeout=45, http_client=http
    ) as client:
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
    refused = cluster.http.post("/v1/chat/completions", json=question(text, n=2))
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
