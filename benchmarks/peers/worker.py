"""What every peer's process does: load, say its versions, then answer one request a line until the input ends.

Standard library only, since it runs in every peer's environment. A request and an answer are a line of JSON each: the
fields of Ask and of Answer.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Ask:
    """One request."""

    image: str  # path
    prompt: str  # the question about it
    keep_ratio: float  # share of the visual tokens to keep
    max_new_tokens: int  # to generate, whatever they are
    variant: str = ""  # of the peer, where it has several in one process


@dataclass(frozen=True)
class Answer:
    """One answer of a peer."""

    first_token_ms: float  # from prompt and image file to the first token
    token_ms: float  # of each later token, the mean
    num_tokens: int  # generated
    text: str  # the answer
    cpu_ms: float = 0.0  # processor time of all threads and child processes, from the prompt to the last token

    @property
    def total_ms(self) -> float:
        """From the prompt to the last token."""
        return self.first_token_ms + self.token_ms * (self.num_tokens - 1)


def arguments() -> argparse.Namespace:
    """What the parent process says: the model, how many threads, and --defaults for the peer's own precision."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--defaults", action="store_true")
    return parser.parse_args()


def serve(packages: tuple[str, ...], answer: Callable[[Ask], Answer]) -> None:
    """Say the versions of packages, then answer requests."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print belongs to stderr
    print(json.dumps({name: metadata.version(name) for name in packages}), file=out, flush=True)
    for line in sys.stdin:
        started = sum(os.times()[:4])
        result = answer(Ask(**json.loads(line)))
        fields = asdict(result) | {"cpu_ms": 1e3 * (sum(os.times()[:4]) - started)}
        print(json.dumps(fields), file=out, flush=True)
