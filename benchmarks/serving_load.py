"""A server under load: `make check-serving`. Exit 1 where an answer differs, is lost, or memory keeps growing.

In: a bundle of the tiny model. A server process of its own is asked by the official client, half of the requests
streamed, about fresh pictures at several keep ratios, and without a picture; every answer is compared with the
pipeline's own. First many clients for some time, then a number of requests with the server's memory read on the way,
then as many with every second client leaving, at any moment from the connection to the middle of the answer.
Out: throughput, latencies, what was refused and tried again, memory, and what the server still holds at the end.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx2
import openai
from PIL import Image

from examples.tiny_task.samples import generate
from hawk_trt import Pipeline, PruningConfig

_MODEL = "tiny"
_MAX_TOKENS = 8
_KEEP_RATIOS = (0.2, 1.0, 0.1)
_MAX_GROWTH_MB = 16.0
_READINGS = 20
_EVERY_WORKER = 10  # so many requests, one of which a worker process prepares
_PHASES = ("connection", "half the head", "head", "half the body", "body", "a moment later", "half closed", "head of "
           "the answer", "first event")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Question:
    """A request and the answer that the pipeline gives without a server."""

    body: dict[str, Any]
    keep_ratio: float
    answer: str


@dataclass(frozen=True, slots=True)
class Held:
    """What a process holds."""

    megabytes: float
    files: int
    threads: int
    processes: int

    @classmethod
    def of(cls, process: int) -> "Held":
        """Of a process, now."""
        folder = Path(f"/proc/{process}")
        children = {child for file in folder.glob("task/*/children") for child in file.read_text().split()}
        files, threads = len(list((folder / "fd").iterdir())), len(list((folder / "task").iterdir()))
        return cls(_resident_mb(process), files, threads, len(children))

    def __str__(self) -> str:
        return (
            f"{self.megabytes:9.2f} MB {self.files:4d} files {self.threads:3d} threads {self.processes} other processes"
        )


@dataclass(slots=True)
class Tally:
    """What the clients saw; seconds."""

    latency: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    tokens: int = 0
    retried: int = 0
    different: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


def questions(bundle: Path, count: int) -> list[Question]:
    """Questions with their answers, every seventh without a picture."""
    asked = []
    with Pipeline.load(bundle, threads=1) as pipe:
        for number, sample in enumerate(generate(7, count)):
            ratio = _KEEP_RATIOS[number % len(_KEEP_RATIOS)]
            content: list[dict[str, Any]] = [{"type": "text", "text": sample.question}]
            if number % 7:
                file = io.BytesIO()
                Image.fromarray(sample.image).save(file, "PNG")
                url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
                content.insert(0, {"type": "image_url", "image_url": {"url": url}})
            images = [sample.image] if number % 7 else []
            answer = pipe.generate(
                sample.question, images, pruning=PruningConfig(keep_ratio=ratio), max_new_tokens=_MAX_TOKENS
            )
            body = {"model": _MODEL, "messages": [{"role": "user", "content": content}]}
            asked.append(Question(body | {"temperature": 0, "max_tokens": _MAX_TOKENS}, ratio, answer.text or ""))
    return asked


@contextmanager
def server(bundle: Path, threads: int, queue: int) -> Iterator[tuple[str, int]]:
    """A server process: its address and id."""
    run = [sys.executable, "-m", "hawk_trt", "serve", str(bundle), "--port", "0", "--model-name", _MODEL]
    run += ["--threads", str(threads), "--max-queue", str(queue), "--vision-cache-mb", "4"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        url = ""
        for line in process.stderr:
            url = url or next(iter(re.findall(r"http://[\d.:]+", line)), "")
            if "ready:" in line:
                break
        drain = asyncio.get_running_loop().run_in_executor(None, process.stderr.read)  # or its log fills the pipe
        try:
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(60)
            del drain


async def ask(client: openai.AsyncOpenAI, question: Question, stream: bool, tally: Tally) -> None:
    """One request; told to come back, it does, as often as it takes."""
    extra = {"pruning": {"keep_ratio": question.keep_ratio}}
    while True:
        begun = time.perf_counter()
        text = ""
        try:
            if stream:
                options = {"stream": True, "stream_options": {"include_usage": True}}
                async for chunk in await client.chat.completions.create(**question.body, **options, extra_body=extra):
                    if chunk.usage is not None:
                        tally.tokens += chunk.usage.completion_tokens
                    if chunk.choices and chunk.choices[0].delta.content:
                        if not text:
                            tally.first_token.append(time.perf_counter() - begun)
                        text += chunk.choices[0].delta.content
            else:
                whole = await client.chat.completions.create(**question.body, extra_body=extra)
                text = whole.choices[0].message.content or ""
                tally.tokens += whole.usage.completion_tokens
        except openai.RateLimitError as refused:
            tally.retried += 1
            await asyncio.sleep(float(refused.response.headers["retry-after"]))
            continue
        except openai.OpenAIError as error:
            tally.failed.append(f"{type(error).__name__}: {error}")
            return
        tally.latency.append(time.perf_counter() - begun)
        if text != question.answer:
            tally.different.append(f"{text!r}, without the server {question.answer!r}")
        return


async def many_clients(url: str, asked: list[Question], clients: int, seconds: float) -> Tally:
    """So many clients, each asking one question after the other, for some time."""
    tally = Tally()
    until = time.monotonic() + seconds

    async def client(number: int) -> None:
        turn = number
        async with _client(url, 1) as own:
            while time.monotonic() < until:
                await ask(own, asked[turn % len(asked)], turn % 2 == 0, tally)
                turn += clients + 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return tally


async def memory_over(url: str, process: int, asked: list[Question], requests: int) -> tuple[Tally, list[float]]:
    """A number of requests, eight at a time, and the server's resident megabytes on the way."""
    tally, seen = Tally(), []
    async with _client(url, 8) as client:
        for part in range(_READINGS):
            numbers = iter(range(part * requests // _READINGS, (part + 1) * requests // _READINGS))

            async def worker(numbers: Iterator[int] = numbers) -> None:
                for number in numbers:
                    await ask(client, asked[number % len(asked)], number % 2 == 0, tally)

            await asyncio.gather(*(worker() for _ in range(8)))
            seen.append(_resident_mb(process))
            print(f"  {(part + 1) * requests // _READINGS:6d} requests {seen[-1]:9.2f} MB", flush=True)
    return tally, seen


async def leaving(url: str, process: int, asked: list[Question], requests: int) -> tuple[Tally, list[Held]]:
    """Requests eight at a time, every second of a client that leaves; what the server holds on the way."""
    tally, seen = Tally(), []
    chance = random.Random(0)
    async with _client(url, 8) as client:
        for part in range(_READINGS):
            numbers = iter(range(part * requests // _READINGS, (part + 1) * requests // _READINGS))

            async def worker(numbers: Iterator[int] = numbers) -> None:
                for number in numbers:
                    question = asked[number % len(asked)]
                    if number % _EVERY_WORKER < 2:  # more commas than a thread would prepare
                        question = replace(question, body=question.body | {"user": "," * 10_001})
                    if number % 2:
                        await ask(client, question, number % 4 == 1, tally)
                    else:
                        await _leave(url, question, number // 2 % len(_PHASES), chance)

            await asyncio.gather(*(worker() for _ in range(8)))
            await _idle(url)
            seen.append(Held.of(process))
            print(f"  {(part + 1) * requests // _READINGS:6d} requests {seen[-1]}", flush=True)
    return tally, seen


async def _leave(url: str, question: Question, phase: int, chance: random.Random) -> None:
    """Send a request as far as a phase, and close the connection."""
    body = json.dumps(question.body | {"stream": True, "pruning": {"keep_ratio": question.keep_ratio}}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(body)
    parts = (b"", head[:60], head, head + body[: len(body) // 2], head + body)
    reader, writer = await asyncio.open_connection(*url.removeprefix("http://").split(":"))
    writer.write(parts[min(phase, len(parts) - 1)])
    with suppress(ConnectionError, asyncio.IncompleteReadError):
        await writer.drain()
        if _PHASES[phase] == "a moment later":
            await asyncio.sleep(chance.uniform(0, 0.2))
        elif _PHASES[phase] == "half closed":
            writer.write_eof()
            await asyncio.sleep(chance.uniform(0, 0.2))
        elif phase > _PHASES.index("half closed"):
            await reader.readuntil(b"\r\n\r\n")
            if _PHASES[phase] == "first event":
                await reader.readuntil(b"\n\n")
    with suppress(ConnectionError):
        writer.close()
        await writer.wait_closed()


async def _idle(url: str) -> None:
    """Wait until the server has nothing to do."""
    names = ("hawk_queued_requests", "hawk_running_requests", "hawk_kv_cache_bytes")
    async with httpx2.AsyncClient(trust_env=False) as client:
        for _ in range(600):
            lines = (await client.get(f"{url}/metrics")).text.splitlines()
            held = [line for line in lines if line.startswith(names) and float(line.split()[-1])]
            if not held:
                return
            await asyncio.sleep(0.1)
    raise RuntimeError(f"the server still has {held}")


def report(tally: Tally, seconds: float) -> bool:
    """Print a tally; whether all answers came and were right."""
    count = len(tally.latency)
    print(f"  {count} answers in {seconds:.1f} s: {count / seconds:.1f} a second, {tally.tokens / seconds:.1f} tokens")
    for name, values in (("latency", tally.latency), ("first token", tally.first_token)):
        if len(values) > 1:
            cuts = statistics.quantiles(values, n=100, method="inclusive")
            told = ", ".join(f"p{place} {1000 * cuts[place - 1]:.0f}" for place in (50, 95, 99))
            print(f"  {name} in ms: {told}, longest {1000 * max(values):.0f}")
    print(f"  told to come back {tally.retried} times, failed {len(tally.failed)}, different {len(tally.different)}")
    for line in (*tally.failed[:3], *tally.different[:3]):
        print(f"    {line}")
    return bool(count) and not tally.failed and not tally.different


async def measure(args: argparse.Namespace) -> bool:
    """All runs."""
    asked = questions(args.bundle, args.questions)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {args.threads} thread a stage")
    with server(args.bundle, args.threads, args.queue) as (url, process):
        print(f"{args.clients} clients for {args.seconds:g} s, queue of {args.queue}")
        begun = time.monotonic()
        tally = await many_clients(url, asked, args.clients, args.seconds)
        right = report(tally, time.monotonic() - begun)
        print(f"memory over {args.requests} requests")
        begun = time.monotonic()
        tally, seen = await memory_over(url, process, asked, args.requests)
        right = report(tally, time.monotonic() - begun) and right
        print(f"{args.leaving} requests, every second of a client that leaves: at " + ", ".join(_PHASES))
        begun = time.monotonic()
        tally, held = await leaving(url, process, asked, args.leaving)
        right = report(tally, time.monotonic() - begun) and right
    right = _is_steady("MB", seen, _MAX_GROWTH_MB) and right
    right = _is_steady("MB with clients that leave", [now.megabytes for now in held], _MAX_GROWTH_MB) and right
    right = _is_steady("files", [now.files for now in held], 2) and right
    right = _is_steady("threads", [now.threads for now in held], 2) and right
    return _is_steady("other processes", [now.processes for now in held], 1) and right


def _is_steady(name: str, seen: Sequence[float], most: float) -> bool:
    half = len(seen) // 2
    growth = statistics.median(seen[half:]) - statistics.median(seen[:half])
    print(f"{growth:+.2f} {name} from the first half to the second, expected at most {most:+g}")
    return growth <= most


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=100, help="at a time (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="they ask (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=2000, help="of the memory run (default: %(default)s)")
    parser.add_argument("--leaving", type=int, default=3000, help="of the run of leavers (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=200, help="that differ (default: %(default)s)")
    parser.add_argument("--queue", type=int, default=64, help="of the server (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the server's stages (default: %(default)s)")
    return 0 if asyncio.run(measure(parser.parse_args())) else 1


def _client(url: str, connections: int) -> openai.AsyncOpenAI:
    limits = httpx2.Limits(max_connections=connections)
    http = httpx2.AsyncClient(limits=limits, timeout=300, trust_env=False)
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)


def _resident_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())
