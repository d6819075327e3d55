"""Write samples as PNGs with samples.json beside them: python -m examples.tiny_task --out DIR --count N --seed S."""

import argparse
import io
import json
import sys
from pathlib import Path

from PIL import Image

from hawk_trt.errors import InvalidInput

from .questions import QUESTION_KINDS
from .samples import Sample, generate


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.tiny_task", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=10, help="samples to make")
    parser.add_argument("--seed", type=int, default=0, help="the same seed makes the same samples")
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels, a multiple of 28")
    parser.add_argument(
        "--objects", type=int, nargs=2, default=(10, 16), metavar=("MIN", "MAX"), help="glyphs in a scene"
    )
    parser.add_argument(
        "--straddle", action="store_true", help="let glyphs lie across cells of 28 pixels, which is harder"
    )
    parser.add_argument(
        "--kinds", nargs="+", choices=QUESTION_KINDS, default=QUESTION_KINDS, help="kinds of question, in turn"
    )
    args = parser.parse_args(arguments)
    try:
        samples = generate(
            args.seed,
            args.count,
            size=args.size,
            objects=(args.objects[0], args.objects[1]),
            aligned=not args.straddle,
            kinds=args.kinds,
        )
    except InvalidInput as error:
        parser.error(str(error))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        listing = [_write_sample(args.out, f"{i}-{sample.kind}.png", sample) for i, sample in enumerate(samples)]
        _write(args.out / "samples.json", (json.dumps(listing, indent=1) + "\n").encode())
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{len(listing)} samples written to {args.out}")
    return 0


def _write_sample(folder: Path, name: str, sample: Sample) -> dict[str, object]:
    """Write the picture; returns its entry of samples.json."""
    png = io.BytesIO()
    Image.fromarray(sample.image).save(png, format="PNG", optimize=True)
    _write(folder / name, png.getvalue())
    return {
        "image": name,
        "kind": sample.kind,
        "question": sample.question,
        "answer": sample.answer,
        "targets": [[box.x, box.y, box.width, box.height] for box in sample.targets],
    }


def _write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
