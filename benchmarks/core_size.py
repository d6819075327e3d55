"""How much code one answer takes: the modules of hawk_trt that a `generate` on the CPU loads, and their lines.

In: a bundle. Out: a line a module, then their number and lines; then the lines of the core, without the apps.
"""

import sys
from pathlib import Path

from hawk_trt import Pipeline, PruningConfig

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Answer once, then count."""
    with Pipeline.load(sys.argv[1], device="cpu") as pipe:
        image = ROOT / "examples" / "tiny-vlm" / "samples" / "0-colour.png"
        pipe.generate("What colour is the heart?", [image], pruning=PruningConfig(0.2), max_new_tokens=8)
    files = {name: Path(module.__file__ or "") for name, module in sys.modules.items() if name.startswith("hawk_trt")}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}
    for name in sorted(lines):
        print(f"{lines[name]:6,}  {name}")
    print(f"{sum(lines.values()):6,}  lines in {len(lines)} modules")
    core = [path for path in (ROOT / "hawk_trt").rglob("*.py") if "apps" not in path.parts]
    print(f"{sum(len(path.read_text(encoding='utf-8').splitlines()) for path in core):6,}  lines of the whole core")
    return 0


if __name__ == "__main__":
    sys.exit(main())
