"""Requests that take long to prepare: a worker process does it, within limits, and hinders no other request."""

import os
import pickle
import signal
import socket
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest

from hawk_trt.apps.serve.errors import ApiError, invalid
from hawk_trt.apps.serve.worker import Workers
from serving import SAMPLES, data_url, question, samples, serving, wait_for

PICTURE = SAMPLES / "0-colour.png"


def large(side=9400):
    """A PNG of a few kilobytes, the decoding of which takes a second or so and 400 MB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def slow(images=8):
    return question("What is it?", *[data_url(large())] * images)


def workers(server):
    return server.service.workers.limiter.borrowed_tokens


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving(tiny_bundle, prepare_seconds=0.5) as running:
        yield running


def test_a_worker_prepares_what_a_thread_prepares(server, monkeypatch):
    picture, text, _ = samples()[0]
    bodies = [
        question(text, picture, hawk={"details": True}, n=2, temperature=1, seed=3),
        question(text),
        question(text, picture, foo=1),
        question(text, "data:image/png;base64,%%"),
        question(text) | {"model": "another"},
    ]

    def answers():
        for body in bodies:
            got = server.http.post("/v1/chat/completions", json=body)
            told = got.json()
            yield got.status_code, got.headers.get("x-hawk-ignored"), told.get("choices"), told.get("error")

    by_thread = list(answers())
    assert [status for status, *_ in by_thread] == [200, 200, 200, 400, 404]
    monkeypatch.setattr("hawk_trt.apps.serve.prompt._SMALL_BODY_BYTES", 0)
    assert list(answers()) == by_thread


def test_what_takes_too_long_is_ended_and_others_are_answered_meanwhile(server):
    with ThreadPoolExecutor(1) as other:
        refused = other.submit(server.http.post, "/v1/chat/completions", json=slow())
        wait_for(lambda: workers(server) == 1)
        for ask in (question(), question("What colour is the heart?", PICTURE)):
            assert server.http.post("/v1/chat/completions", json=ask).status_code == 200
    assert (refused.result().status_code, refused.result().json()["error"]["code"]) == (400, "too_much_work")
    assert workers(server) == 0


def test_a_worker_ends_with_its_client(tiny_bundle):
    def children():
        return {pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()}

    with serving(tiny_bundle, prepare_seconds=600) as server:
        before = children()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            body = server.http.build_request("POST", "/v1/chat/completions", json=slow(16))
            head = b"".join(b"%s: %s\r\n" % pair for pair in body.headers.raw)
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\n" + head + b"\r\n" + body.content)
            wait_for(lambda: children() - before)
        wait_for(lambda: not (server.service.open_requests or children() - before))
        assert workers(server) == 0


def test_more_memory_than_a_request_may_take_is_refused(tiny_bundle, monkeypatch):
    monkeypatch.setattr("hawk_trt.apps.serve.prompt._SMALL_BODY_BYTES", 0)
    with serving(tiny_bundle, prepare_mb=500) as server:
        refused = server.http.post("/v1/chat/completions", json=slow(1))
        assert refused.status_code == 400, refused.text
        assert "memory" in refused.json()["error"]["message"]


def test_an_error_of_a_worker_arrives_as_it_was():
    for error in (
        invalid("n: got 9", "n"),
        ApiError(429, "full", code="queue_full", retry=True),
        ApiError(401, "x", code="k"),
    ):
        got = pickle.loads(pickle.dumps(error))
        assert (got.status, got.body, got.headers) == (error.status, error.body, error.headers)


def test_a_worker_that_the_system_ended_costs_no_request():
    pool = Workers(1)

    async def ask():
        return await pool.run(os.getpid)

    first = anyio.run(ask)
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: pool._idle[0].poll() is not None)
    try:
        assert anyio.run(ask) not in (first, os.getpid())
    finally:
        pool.close()
