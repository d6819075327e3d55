"""`hawk-trt explain`: one prompt answered at several keep ratios, drawn as a PNG and told as a table or JSON."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hawk_trt.apps.cli.drawing import draw
from hawk_trt.apps.cli.options import OUTPUT, Json, KeepRatios, Prompt, Pruning, Where
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.apps.explain.explanation import explain as explanation
from hawk_trt.errors import InvalidInput


def explain(
    model: Path,
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
        model: a bundle or engines; or a checkpoint or hub id, which is exported first, once
        keep_ratios: shares of visual tokens kept, each in (0, 1], with commas between them
        out: PNG file, the picture
        json: print grids, scores, kept tokens and answers as JSON
    """
    if not (prompt.image or prompt.video):
        raise InvalidInput("prompt: it has no image or video, so there is nothing to explain. Add --image or --video")
    configs = [pruning.config(keep_ratio) for keep_ratio in keep_ratios]
    text = prompt.text()
    pipe = where.open(model)
    inputs = pipe.prepare(
        prompt.messages(text),
        images=prompt.image,
        videos=prompt.video,
        min_pixels=prompt.min_pixels,
        max_pixels=prompt.max_pixels,
    )
    results = []
    for config in configs:
        note(f"keep ratio {config.keep_ratio:g}")
        result = pipe.generate(inputs, pruning=config, max_new_tokens=prompt.max_new_tokens)
        results.append((config.keep_ratio, result))
    merge = pipe.bundle.manifest.vision.spatial_merge_size
    explained = explanation(text, pipe.layout(inputs), results, merge, pruning.selector)
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
