"""`hawk-trt explain`: one prompt answered at several keep ratios, drawn as a PNG and told as a table or JSON."""

from collections.abc import Sequence
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from hawk_trt.apps.cli.options import OUTPUT, Json, KeepRatios, Model, Prompt, Pruning, Where
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.apps.explain.explanation import Explanation
from hawk_trt.apps.explain.explanation import explain as explanation
from hawk_trt.apps.explain.picture import load_frames, render, save
from hawk_trt.errors import InvalidInput
from hawk_trt.request import ModelInputs, Result

if TYPE_CHECKING:
    from hawk_trt import Pipeline


def explain(
    model: Model,
    prompt: Prompt,
    where: Where = Where(),
    pruning: Pruning = Pruning(),
    *,
    keep_ratios: KeepRatios = (0.1, 0.2, 0.4),
    out: Annotated[Path, Parameter(group=OUTPUT)] = Path("explain.png"),
    json: Json = False,
) -> int:
    """Draw which visual tokens are kept, and what is answered from them.

    Example: hawk-trt explain artifacts/3b --image photo.jpg --prompt "What does the sign say?" --out kept.png

    Args:
        keep_ratios: shares of visual tokens kept, each in (0, 1], with commas between them
        out: PNG file, the picture
        json: print grids, scores, kept tokens and answers as JSON
    """
    if not (prompt.image or prompt.video):
        raise InvalidInput("prompt: it has no image or video, so there is nothing to explain. Add --image or --video")
    configs = [pruning.config(keep_ratio) for keep_ratio in keep_ratios]
    text = prompt.text()
    pipe = where.open(model)
    inputs = pipe.prepare(prompt.messages(text), **prompt.media)
    results = []
    for config in configs:
        note(f"keep ratio {config.keep_ratio:g}")
        result = pipe.generate(inputs, pruning=config, max_new_tokens=prompt.max_new_tokens)
        results.append((config.keep_ratio, result))
    explained = lay_out(pipe, text, inputs, results, pruning)
    if json:
        print_json(explained, {"picture": str(out)})
    else:
        print("keep ratio  kept            answer")
        for selection in explained.selections:
            kept = f"{selection.num_kept} of {explained.num_visual}"
            print(f"{selection.keep_ratio:<10g}  {kept:<14}  {' '.join((selection.answer or '').split())}")
    draw(out, explained, prompt, pruning, pipe)
    note(f"picture: {out}")
    return 0


def lay_out(
    pipe: "Pipeline", text: str, inputs: ModelInputs, results: Sequence[tuple[float, Result]], pruning: Pruning
) -> Explanation:
    """What the results kept of a prompt's images; text is shown as the question."""
    merge = pipe.bundle.manifest.vision.spatial_merge_size
    return explanation(text, pipe.processor.layout(inputs), results, merge, pruning.selector)


def draw(path: Path, explained: Explanation, prompt: Prompt, pruning: Pruning, pipe: "Pipeline") -> None:
    """Write the picture of an explanation."""
    shown = [file for file in (*prompt.image, *prompt.video) if isfile(file)]  # noqa: PTH113 - a data URL is no path
    if path.is_file() and any(path.samefile(file) for file in shown):
        raise InvalidInput(f"{path}: the picture would take the place of what was asked about. Give it another name")
    manifest = pipe.bundle.manifest
    frames = load_frames(explained, pipe, prompt.image, prompt.video, prompt.fps, prompt.max_frames)
    share = {"global": "", "per-image": " Each image keeps its share.", "per-frame": " Each frame keeps its share."}
    note = f"Model: {Path(manifest.source.name).name}, {manifest.precision}.{share[pruning.quota]}"
    save(render(explained, frames, note=note), path)
