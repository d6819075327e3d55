"""Train the tiny model anew: python -m examples.tiny_training --out DIR. Needs torch >= 2.9 and transformers."""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import torch

from examples.tiny_training.checkpoint import WEIGHTS, write_checkpoint
from examples.tiny_training.recipe import STAGES
from examples.tiny_training.trainer import Trainer
from hawk_trt.errors import HawkError

_LIKE = Path(__file__).parent.parent / "tiny-vlm"
_LOG = "log.txt"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny_training",
        description="Train the tiny model anew, on one thread; the same seed, versions and kind of processor give the "
        "same weights. A killed run goes on with the same command.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new checkpoint's folder")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("artifacts/tiny-training"),
        metavar="DIR",
        help="the run's log and state, which a killed run is gone on with",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first weights and of all lessons")
    parser.add_argument(
        "--like", type=Path, default=_LIKE, metavar="DIR", help="checkpoint with config, tokenizer and image settings"
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        with (args.work / _LOG).open("a", encoding="utf-8") as log:

            def say(line: str) -> None:
                for stream in (sys.stderr, log):
                    print(time.strftime("%H:%M:%S"), line, file=stream, flush=True)

            say(f"seed {args.seed}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
            trainer = Trainer(args.like, args.work, args.seed, STAGES, say)
            trainer.run()
            write_checkpoint(trainer.model.state_dict(), args.like, args.out)
            digest = hashlib.sha256((args.out / WEIGHTS).read_bytes()).hexdigest()
            say(f"{args.out / WEIGHTS}: sha256 {digest}")
    except (HawkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with it", file=sys.stderr)
        return 130
    print(f"{args.out}: sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
