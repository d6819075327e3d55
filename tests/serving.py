"""A server of the tiny model in a thread, and what its clients send."""

import base64
import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx2
import openai

from hawk_trt import Pipeline
from hawk_trt.apps.serve.app import create_app
from hawk_trt.apps.serve.server import Server, listen
from hawk_trt.apps.serve.settings import ServeSettings
from hawk_trt.request import PruningConfig

SAMPLES = Path(__file__).parent.parent / "examples" / "tiny-vlm" / "samples"
MODEL = "tiny-vlm"


class Running:
    """A server that runs.

    Attributes:
        pipe, settings, app, server, url: of it.
    """

    def __init__(self, pipe, settings):
        self.pipe, self.settings = pipe, settings
        self.app = create_app(pipe, settings)
        self.service = self.app.state.service
        self._socket = listen("127.0.0.1", 0)
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = Server(self.app)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._socket]})
        self._thread.start()
        self.http = httpx2.Client(base_url=self.url, timeout=60, trust_env=False)

    def wait_ready(self):
        wait_for(lambda: self.http.get("/ready").status_code == 200)
        return self

    def close(self):
        self.http.close()
        self.server.should_exit = True
        self._thread.join()
        self._socket.close()

    def openai(self, key="none"):
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=httpx2.Client(trust_env=False)
        )

    def ask(self, **fields):
        return self.http.post("/v1/chat/completions", json=question(**fields))


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


@contextmanager
def serving(bundle, vision_cache_mb=64, **settings):
    """A server that is ready, of its own pipeline unless one is given."""
    settings = {"model_name": MODEL, "pruning": PruningConfig(keep_ratio=0.2), **settings}
    pipe = bundle if isinstance(bundle, Pipeline) else Pipeline.load(bundle, threads=1, vision_cache_mb=vision_cache_mb)
    running = Running(pipe, ServeSettings(**settings))
    try:
        yield running.wait_ready()
    finally:
        running.close()
        if pipe is not bundle:
            pipe.close()


def samples():
    """Picture, question and answer of each sample."""
    entries = json.loads((SAMPLES / "samples.json").read_text())
    return [(SAMPLES / entry["image"], entry["question"], entry["answer"]) for entry in entries]


def data_url(content, kind="png"):
    content = content.read_bytes() if isinstance(content, Path) else content
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def image(source):
    url = source if isinstance(source, str) else data_url(source)
    return {"type": "image_url", "image_url": {"url": url}}


def question(text="What colour is the heart?", *pictures, **fields):
    """The body of a request."""
    content = [*map(image, pictures), {"type": "text", "text": text}] if pictures else text
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
    return body | fields


def raw_request(port, content, seconds=10):
    """Send bytes to the server; all that it answers."""
    parts = []
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as client:
        with suppress(ConnectionError):  # the server has answered and closed before all of it came
            client.sendall(content)
        with suppress(ConnectionError):
            while part := client.recv(65536):
                parts.append(part)
    return b"".join(parts)
