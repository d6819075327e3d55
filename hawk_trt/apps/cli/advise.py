"""`hawk-trt advise`: what pruning would gain on this machine, from a short measurement of its stages."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from typing import TYPE_CHECKING, Annotated

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table

from hawk_trt.apps.bench.advice import Prediction, TimeModel, measure, prompt_size
from hawk_trt.apps.cli.options import PROMPT, Json, KeepRatios, Model, Numbers, Pixels, Where
from hawk_trt.apps.cli.output import note, print_json, table
from hawk_trt.errors import InvalidInput
from hawk_trt.request import ModelInputs, PruningConfig, Result

if TYPE_CHECKING:
    from hawk_trt import Pipeline
    from hawk_trt.request import ImageInput

_PROMPT = "Describe what is shown in this image."


def advise(
    model: Model,
    where: Where = Where(),
    pixels: Pixels = Pixels(),
    *,
    image: Annotated[tuple[str, ...], Parameter(group=PROMPT)] = (),
    image_size: Annotated[int, Parameter(group=PROMPT)] = 1008,
    prompt: Annotated[str, Parameter(group=PROMPT, allow_leading_hyphen=True)] = _PROMPT,
    keep_ratios: KeepRatios = (0.6, 0.4, 0.2, 0.1),
    max_new_tokens: Annotated[Numbers, Parameter(alias="--max-tokens")] = (1, 32, 128, 512),
    seconds: float = 20.0,
    json: Json = False,
) -> int:
    """Predict the time to answer by keep ratio on this machine, and recommend one.

    Example: hawk-trt advise artifacts/3b --image photo.jpg --prompt "What does the sign say?"

    Args:
        image: an image like yours; repeatable (default: noise)
        image_size: height and width of the noise
        prompt: a question like yours
        keep_ratios: shares of visual tokens kept, with commas between them
        max_new_tokens: lengths of the answer, with commas between them
        seconds: for measuring, at least two rounds
        json: print all as JSON
    """
    ratios = sorted({1.0, *(PruningConfig(keep_ratio=ratio).keep_ratio for ratio in keep_ratios)}, reverse=True)
    lengths = [int(length) for length in max_new_tokens]
    if min(lengths) < 1 or lengths != list(max_new_tokens):
        raise InvalidInput(f"--max-new-tokens: got {list(max_new_tokens)}, expected integers of at least 1")
    if image_size < 1:
        raise InvalidInput(f"--image-size: got {image_size}, expected at least 1")
    with where.open(model) as pipe:
        noise = np.random.default_rng(0).integers(0, 256, (image_size, image_size, 3), dtype=np.uint8)
        asked: str | ModelInputs = prompt
        shown: Sequence[ImageInput] = image or [noise]
        if pipe.processor.chat is None:
            asked, shown = _tensors(pipe, image, image_size), ()

        def ask(pruning: PruningConfig, new_tokens: int) -> Result:
            return pipe.generate(asked, shown, (), pruning, new_tokens, ignore_eos=True, **asdict(pixels))

        size = prompt_size(pipe, ask(PruningConfig(keep_ratio=1.0), 1))
        note(f"measuring {size.num_text} text and {size.num_visual} visual tokens, about {seconds:g} s")
        times = measure(ask, seconds)
        backend, language = pipe.backend, pipe.bundle.manifest.language
    predictor = TimeModel(size, times)
    runtime = f"{backend.name}, {backend.device}, {backend.target}"
    predicted = [[predictor.predict(ratio, length) for length in lengths] for ratio in ratios]
    recommended = [predictor.recommend([r for r in ratios if r < 1.0], length) for length in lengths]
    shares = [predictor.whole_share(language, ratio) for ratio in ratios if language.scoring_layer]
    if json:
        told = {"predictions": list(chain(*predicted)), "recommendations": recommended, "whole_shares": shares}
        print_json({"bundle": str(model), "runtime": runtime, "size": size, "measured": times, **told})
        return 0
    full = times[0]
    console = Console()
    console.print(
        f"{runtime}: {size.num_text} text and {size.num_visual} visual tokens. Unpruned, in ms: "
        f"image {1000 * full.image:.1f}, first_layer {1000 * full.first_layer:.1f}, "
        f"decoder {1000 * full.decoder:.1f}, rest {1000 * full.rest:.1f}, a token {1000 * full.step:.2f}"
    )
    console.print("Predicted, in ms (and how many times as fast as unpruned):")
    console.print(_table(predicted))
    if shares:
        parts = [f"{100 * one.measured:.0f} % ({100 * one.by_products:.0f} %) at {one.keep_ratio:g}" for one in shares]
        console.print(
            f"The first {shares[0].layers} layers are linear attention and run over all tokens. Their "
            f"share of the prefill, measured (and of its multiplications): {', '.join(parts)}."
        )
    for one in recommended:
        choice = "do not prune here" if one.keep_ratio is None else f"keep ratio {one.keep_ratio:g}"
        console.print(f"{one.new_tokens} token{'s' * (one.new_tokens > 1)}: {choice}: {one.reason}.")
    console.print("This is time alone; how right the answers stay: hawk-trt eval.")
    return 0


def _tensors(pipe: "Pipeline", image: tuple[str, ...], side: int) -> ModelInputs:
    """A prompt for a bundle without a tokenizer: noise between special tokens."""
    from hawk_trt.runtime.reference import random_inputs  # only such bundles need it

    if image:
        raise InvalidInput("--image: this bundle has no tokenizer, so it is measured with noise; choose --image-size")
    return random_inputs(pipe.bundle.manifest, np.random.default_rng(0), [(side, side)], 0)


def _table(predicted: list[list[Prediction]]) -> Table:
    """A row for each keep ratio, the unpruned one first; a column for each length of the answer."""
    whole = predicted[0]
    lengths = [f"{one.new_tokens} tokens" for one in whole if one.new_tokens > 1]
    shown = table("keep", "kept", "first token", *lengths)
    for row in predicted:
        totals = [
            f"{_ms(one.total)} ({full.total / one.total:.2f}x)"
            for one, full in zip(row, whole, strict=True)
            if one.new_tokens > 1
        ]
        shown.add_row(f"{row[0].keep_ratio:g}", str(row[0].num_kept), _ms(row[0].first_token), *totals)
    return shown


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.{0 if seconds >= 0.1 else 1}f}"
