"""`hawk-trt demo`: the tiny model that comes along answers questions about its images, with few of their tokens."""

import json
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from hawk_trt.apps.cli.explain import draw, lay_out
from hawk_trt.apps.cli.models import ready, tiny_checkpoint
from hawk_trt.apps.cli.options import OUTPUT, KeepRatio, Prompt, Pruning
from hawk_trt.apps.cli.output import note

_NEXT = """\
Next:
  hawk-trt chat tiny                            ask it yourself, about images such as those of {samples}
  hawk-trt chat Qwen/Qwen2.5-VL-3B-Instruct     the same with a real model: 7.5 GB are downloaded, then exported once
  hawk-trt serve Qwen/Qwen2.5-VL-3B-Instruct    an OpenAI server and a page at http://127.0.0.1:8000
  hawk-trt doctor                               what works on this machine"""


def demo(
    *, keep_ratio: KeepRatio = 0.2, out: Annotated[Path, Parameter(group=OUTPUT)] = Path("hawk-trt-demo.png")
) -> int:
    """Ask the tiny model that comes along about its images, with few of their tokens.

    Example: hawk-trt demo --keep-ratio 0.1

    Args:
        keep_ratio: share of visual tokens kept, in (0, 1]
        out: PNG file, to draw the kept tokens of the first question
    """
    from hawk_trt import Pipeline

    pruning = Pruning()
    config = pruning.config(keep_ratio)
    checkpoint = tiny_checkpoint()
    samples = json.loads((checkpoint / "samples" / "samples.json").read_text(encoding="utf-8"))
    with Pipeline.load(ready(checkpoint)) as pipe:
        print(f"{'image':<14}{'question':<34}{'answer':<12}from visual tokens")
        drawn = None
        for sample in samples:
            image, question = checkpoint / "samples" / sample["image"], sample["question"]
            result = pipe.generate(question, images=[image], pruning=config, max_new_tokens=16)
            print(f"{image.name:<14}{question:<34}{result.text or '':<12}{result.num_kept} of {result.num_visual}")
            if drawn is None:
                prompt = Prompt(prompt=question, image=(str(image),))
                inputs, chosen = pipe.prepare(question, **prompt.media), [(config.keep_ratio, result)]
                drawn = lay_out(pipe, question, inputs, chosen, pruning)
                draw(out, drawn, prompt, pruning, pipe)
    note(f"picture        {out}: the tokens that the first answer was made from")
    note(_NEXT.format(samples=checkpoint / "samples"))
    return 0
