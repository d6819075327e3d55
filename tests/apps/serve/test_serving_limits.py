"""A server that is busy, slow, failing, stopping or closed to some: what its clients see, and that all comes back."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2
import openai
import pytest

from hawk_trt import ModelInputs, Pipeline
from hawk_trt.apps.cli.main import main
from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.errors import BackendError, InvalidInput
from serving import MODEL, SAMPLES, Running, question, raw_request, serving, wait_for

ROOT = Path(__file__).parents[3]
PICTURE = SAMPLES / "0-colour.png"
TEXT = "What colour is the heart?"


@pytest.fixture(scope="module")
def pipe(tiny_bundle):
    with Pipeline.load(tiny_bundle, threads=1, vision_cache_mb=0) as pipe:
        yield pipe


@contextmanager
def held(pipe, monkeypatch):
    """A pipeline whose vision stage waits until it is let go."""
    go, encode = threading.Event(), pipe.backend.encode

    def waiting(feeds, num_rows):
        go.wait(30)
        return encode(feeds, num_rows)

    with monkeypatch.context() as patched:
        patched.setattr(pipe.backend, "encode", waiting)
        try:
            yield go
        finally:
            go.set()


@contextmanager
def held_steps(server, monkeypatch):
    """A server that makes no second token of an answer until the end of the block."""
    scheduler, go = server.service.batcher._scheduler, threading.Event()
    step = scheduler._decode
    monkeypatch.setattr(scheduler, "_decode", lambda: (go.wait(60), step())[1])
    try:
        yield
    finally:
        go.set()


def nothing_left(server):
    service = server.service
    batcher = service.batcher
    wait_for(lambda: not (service.open_requests or batcher.queued or batcher.running or batcher.cache_bytes))
    wait_for(lambda: service.held_bytes == service.open_choices == 0)


def test_one_request_too_many_is_told_to_come_back(pipe, monkeypatch):
    with serving(pipe, max_batch=1, max_queue=2) as server, ThreadPoolExecutor(3) as clients:
        with held(pipe, monkeypatch) as go:
            taken = [clients.submit(server.ask) for _ in range(3)]
            wait_for(lambda: server.service.open_requests == 3)
            refused = server.ask()
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"]["code"] == "queue_full"
            go.set()
            assert [answer.result().status_code for answer in taken] == [200] * 3
        assert server.ask().status_code == 200
        nothing_left(server)


def test_the_official_client_comes_back_by_itself(pipe, monkeypatch):
    with serving(pipe, max_batch=1, max_queue=1) as server, ThreadPoolExecutor(3) as clients:
        with held(pipe, monkeypatch) as go:
            taken = [clients.submit(server.ask) for _ in range(2)]
            wait_for(lambda: server.service.open_requests == 2)
            patient = server.openai().with_options(max_retries=4)
            late = clients.submit(lambda: patient.chat.completions.create(**question()))
            wait_for(lambda: b'status="429"' in server.http.get("/metrics").content)
            go.set()
        assert late.result().choices[0].message.content
        assert [answer.result().status_code for answer in taken] == [200] * 2
        patient.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place_and_memory(pipe, monkeypatch, stream):
    with serving(pipe, max_batch=2, max_queue=8) as server:
        with held(pipe, monkeypatch) as go:
            body = json.dumps(question(TEXT, PICTURE, stream=stream)).encode()
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
            with ExitStack() as leaving:
                for _ in range(4):
                    client = leaving.enter_context(socket.create_connection(("127.0.0.1", server.port)))
                    client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
                wait_for(lambda: server.service.batcher.queued + server.service.batcher.running == 4)
            wait_for(lambda: server.service.open_requests == 0)
            go.set()
        nothing_left(server)
        counters = server.service.batcher.counters
        assert counters.finished + counters.cancelled == 2 + 4  # the warm-up's and these
        assert counters.cancelled >= 2  # two may have been at a prompt they share, and end with the next step
        wait_for(lambda: b'status="499"} 4.0' in server.http.get("/metrics").content)
        assert server.ask().status_code == 200


def test_a_client_that_leaves_in_the_middle_of_a_stream_ends_its_answer(pipe, monkeypatch):
    with serving(pipe) as server:
        body = question("In which corner is the circle?", SAMPLES / "1-where.png", stream=True)
        with held_steps(server, monkeypatch):
            with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
                next(response.iter_lines())
            wait_for(lambda: server.service.open_requests == 0)
        nothing_left(server)
        assert server.service.batcher.counters.cancelled == 1


def test_an_answer_that_does_not_begin_in_time_is_given_up(pipe, monkeypatch):
    with serving(pipe, first_token_seconds=0.3) as server:
        with held(pipe, monkeypatch):
            late = server.ask()
        assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
        nothing_left(server)
        server.service.settings = replace(server.settings, first_token_seconds=60.0)
        assert server.ask().status_code == 200


def test_an_answer_that_is_not_complete_in_time_ends_with_an_error(pipe, monkeypatch):
    with serving(pipe, request_seconds=2.0) as server, held_steps(server, monkeypatch):
        body = question("In which corner is the circle?", SAMPLES / "1-where.png", stream=True)
        with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = [line for line in response.iter_lines() if line]
        assert response.status_code == 200
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        server.service.settings = replace(server.settings, request_seconds=0.2)
        whole = server.http.post("/v1/chat/completions", json=body | {"stream": False})
        assert (whole.status_code, whole.json()["error"]["code"]) == (504, "timeout")
    nothing_left(server)


def test_the_official_client_raises_the_error_of_a_broken_stream(pipe, monkeypatch):
    with serving(pipe) as server, server.openai() as client:
        monkeypatch.setattr(server.service.batcher._scheduler, "_gather", lambda: 1 / 0)
        with pytest.raises(openai.APIError, match="Its log says why"):
            list(client.chat.completions.create(**question("Count.", stream=True, max_tokens=32)))


def test_a_body_that_never_comes_is_given_up(pipe):
    with serving(pipe, body_seconds=0.2) as server:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        answer = raw_request(server.port, head + b"Content-Length: 100\r\nConnection: close\r\n\r\n{")
        assert b" 408 " in answer.split(b"\r\n")[0]
        assert b"body_timeout" in answer
        nothing_left(server)


def test_headers_that_never_come_close_the_connection(pipe, monkeypatch):
    monkeypatch.setattr("hawk_trt.apps.serve.server._HEADER_SECONDS", 0.1)
    with serving(pipe) as server:
        begun, whole = b"GET /health HTTP/1.1\r\nHost:", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        assert raw_request(server.port, begun, seconds=3) == b""
        assert raw_request(server.port, whole + begun, seconds=3).count(b" 200 OK") == 1


def test_memory_of_all_requests_together_is_bounded(pipe, monkeypatch):
    with serving(pipe, max_waiting_mb=0.5, max_batch=1) as server, ThreadPoolExecutor(1) as clients:
        with held(pipe, monkeypatch) as go:
            first = clients.submit(server.http.post, "/v1/chat/completions", json=question(TEXT, PICTURE))
            wait_for(lambda: server.service.batcher.running == 1)
            refused = server.http.post("/v1/chat/completions", json=question(TEXT, PICTURE))
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "memory_full")
            go.set()
            assert first.result().status_code == 200
        nothing_left(server)


@pytest.mark.parametrize(
    "error",
    [BackendError("decoder.onnx: /secret/bundle/decoder.onnx failed at 0x7f00"), ZeroDivisionError("/secret/x.py")],
)
def test_an_error_of_the_runtime_tells_the_client_nothing_of_the_inside(pipe, monkeypatch, error, caplog):
    def failing(*_):
        raise error

    with serving(pipe) as server:
        for place, name in ((pipe.backend, "encode"), (pipe, "processor")):
            with monkeypatch.context() as patched:
                patched.setattr(place, name, failing)
                answers = [server.ask(), server.ask(stream=True)]
            for answer in answers:
                assert answer.status_code == 500
                assert answer.json()["error"]["code"] == "internal_error"
                assert not re.search("secret|Traceback|0x|onnx", answer.text)
        assert "secret" in caplog.text
        assert server.ask().status_code == 200
        nothing_left(server)


def test_a_failed_answer_does_not_end_another(pipe, monkeypatch):
    with serving(pipe, max_batch=4) as server, ThreadPoolExecutor(8) as clients:
        processor = pipe.processor

        def sometimes(request):
            if not isinstance(request.prompt, ModelInputs) and "bad" in request.prompt[0]["content"]:
                raise RuntimeError("of this one request")
            return processor(request)

        sometimes.sampling = processor.sampling
        monkeypatch.setattr(pipe, "processor", sometimes)
        texts = ["bad", "Count the circles."] * 8
        answers = list(clients.map(lambda text: server.http.post("/v1/chat/completions", json=question(text)), texts))
        assert [answer.status_code for answer in answers] == [500, 200] * 8
        assert len({answer.json()["choices"][0]["message"]["content"] for answer in answers[1::2]}) == 1


def test_a_server_that_drains_says_so_and_finishes_what_it_has(pipe, monkeypatch):
    with serving(pipe) as server, ThreadPoolExecutor(1) as clients:
        with held(pipe, monkeypatch) as go:
            running = clients.submit(server.ask)
            wait_for(lambda: server.service.open_requests == 1)
            server.service.state = "draining"
            assert server.http.get("/ready").status_code == 503
            assert server.http.get("/health").status_code == 200
            refused = server.ask()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
            go.set()
        assert running.result().status_code == 200


def test_a_server_is_not_ready_before_it_has_warmed_up(tiny_bundle, monkeypatch):
    with Pipeline.load(tiny_bundle, threads=1) as own, held(own, monkeypatch) as go:
        running = Running(own, ServeSettings(model_name=MODEL))
        try:
            assert running.http.get("/ready").status_code == 503
            go.set()
            running.wait_ready()
        finally:
            running.close()


HELD = """
import pathlib, sys, time
from hawk_trt.apps.cli.main import main
from hawk_trt.scheduler import Scheduler
step, held = Scheduler._decode, pathlib.Path(sys.argv.pop(1))
def wait(scheduler):
    while held.exists():
        time.sleep(0.01)
    return step(scheduler)
Scheduler._decode = wait
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def process(bundle, held, *options, **environment):
    """A real server process, which makes no second token while a file exists: its address, and the process."""
    run = [sys.executable, "-c", HELD, str(held), "serve", str(bundle), "--port", "0", "--threads", "1", *options]
    started = subprocess.Popen(run, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        lines = iter(started.stderr.readline, "")
        url = next(re.search(r"http://[\d.:]+", line)[0] for line in lines if line.startswith("serving"))
        next(line for line in lines if "ready:" in line)
        yield url, started
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


def test_sigterm_finishes_running_answers_and_then_ends_the_process(tiny_bundle, tmp_path):
    held = tmp_path / "held"
    with process(tiny_bundle, held, "--model-name", "tiny-vlm", HAWK_API_KEY="secret") as (url, server):
        with httpx2.Client(base_url=url, timeout=60, trust_env=False) as http:
            assert http.post("/v1/chat/completions", json=question()).status_code == 401
            assert http.get("/health", headers={"host": "evil.example"}).status_code == 403
            http.headers["authorization"] = "Bearer secret"
            body = question("In which corner is the circle?", SAMPLES / "1-where.png", stream=True)
            held.touch()
            with http.stream("POST", "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                pieces = [next(lines)]
                server.send_signal(signal.SIGTERM)
                wait_for(lambda: http.get("/ready").status_code == 503)
                assert http.post("/v1/chat/completions", json=question()).json()["error"]["code"] == "not_ready"
                held.unlink()
                pieces += [line for line in lines if line]
        assert pieces[-1] == "data: [DONE]"
        answer = [json.loads(piece[6:])["choices"][0]["delta"].get("content", "") for piece in pieces[:-1]]
        assert "".join(answer) == "top left"
        assert server.wait(20) == 0
        with pytest.raises(httpx2.ConnectError):
            httpx2.get(f"{url}/health", trust_env=False)


def test_a_stream_that_outlasts_the_drain_ends_with_an_error(tiny_bundle, tmp_path):
    held = tmp_path / "held"
    with process(tiny_bundle, held, "--model-name", "tiny-vlm", "--drain-seconds", "0.2") as (url, server):
        body = question("In which corner is the circle?", SAMPLES / "1-where.png", stream=True)
        held.touch()
        with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=20, trust_env=False) as response:
            lines = response.iter_lines()
            next(lines)
            server.send_signal(signal.SIGTERM)
            time.sleep(0.6)
            held.unlink()
            pieces = [line for line in lines if line]
        assert "error" in json.loads(pieces[-1].removeprefix("data: "))
        assert server.wait(20) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--max-batch", "0"], "max_batch"),
        (["--keep-ratio", "2"], "keep_ratio"),
        (["--temperature", "3"], "temperature"),
        (["--api-key-file", "{empty}"], "holds no key"),
        (["--host", "no.such.host.invalid"], "cannot listen"),
        (["--allowed-hosts", "http://my.machine"], "allowed_hosts: got 'http://my.machine'"),
        (["--allowed-hosts", "my.machine:8000"], "without port"),
        (["--remote-host", "https://example.org/pictures"], "remote_hosts"),
        (["--cors-origin", "https://example.org/"], "cors_origins"),
        (["--cors-origin", "example.org"], "cors_origins"),
        (["--api-key", "schlüssel"], "letters beyond ASCII"),
    ],
)
def test_serve_refuses_options_that_cannot_work(tiny_bundle, tmp_path, options, reason, capsys):
    empty = tmp_path / "keys"
    empty.touch()
    assert main(["serve", str(tiny_bundle), *(option.format(empty=empty) for option in options)]) == 1
    assert reason in capsys.readouterr().err


def test_serve_says_so_when_it_is_open_to_others_without_a_key(tmp_path, capsys):
    assert main(["serve", str(tmp_path), "--host", "0.0.0.0", "--port", "0"]) == 1  # there is no bundle either
    assert "no key is set" in capsys.readouterr().err


def test_every_limit_has_an_option_with_its_default(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in ServeSettings.__dataclass_fields__ if "max" in name)
    assert "[default: 64]" in text


def test_prompt_and_answer_share_the_length_of_the_model(pipe):
    body = question("Count.", logit_bias={"458": -100, "5": 100}, max_tokens=20)
    length = pipe.prepare("Count.").input_ids.size
    with serving(pipe, max_model_len=length + 3) as server:
        got = server.http.post("/v1/chat/completions", json=body).json()
        assert (got["usage"]["completion_tokens"], got["choices"][0]["finish_reason"]) == (3, "length")
        refused = server.ask(messages=[{"role": "user", "content": "Count the circles, all of them."}])
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_the_name_of_a_model_may_be_a_path_and_an_address_spelled_out(pipe):
    with serving(pipe, model_name="/models/tiny", allowed_hosts=("0:0:0:0:0:0:0:1", "127.0.0.1")) as server:
        (listed,) = server.http.get("/v1//models").json()["data"]
        assert server.http.get(f"/v1/models/{listed['id']}").json() == listed


def test_limits_below_any_use_are_refused():
    with pytest.raises(InvalidInput, match="max_tokens: got 0"):
        ServeSettings(model_name="m", max_tokens=0)
    assert "secret" not in repr(ServeSettings(model_name="m", api_keys=("secret",)))
