"""`hawk-trt run`: one prompt in, its answer on stdout, and what pruning and time it took on stderr."""

import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from hawk_trt.apps.cli.options import OUTPUT, Json, KeepRatio, Model, Prompt, Pruning, Where
from hawk_trt.apps.cli.output import note, print_json
from hawk_trt.bundle import Bundle
from hawk_trt.request import Result, SamplingConfig, Timings
from hawk_trt.runtime.generation_config import checkpoint_sampling

_SAMPLING = Group("Sampling", sort_key=3)


@Parameter(name="*", group=_SAMPLING)
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        sampling: greedy, or as the model's generation_config.json says; the other options win over it
        temperature: divides the logits; 0 is greedy, and then top_p, top_k and min_p do nothing
        top_p: draw from the smallest set of tokens whose probability reaches it, in (0, 1]
        top_k: draw from the k most probable tokens; 0 takes all
        min_p: draw from tokens of at least this share of the largest probability, in [0, 1]
        seed: random seed (default: another one each time)
        repetition_penalty: above 1, tokens of the prompt and the answer become less probable
        presence_penalty: subtracted from the logits of tokens already in the answer, in [-2, 2]
        frequency_penalty: the same, as often as the token is in the answer
    """

    sampling: Literal["greedy", "model"] = "greedy"
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    def config(self, bundle: Bundle | None = None) -> SamplingConfig:
        """The options that were given; for the rest greedy, or what the bundle's model says where that is asked for."""
        base = checkpoint_sampling(bundle) if bundle and self.sampling == "model" else SamplingConfig()
        given = {name: value for name, value in asdict(self).items() if name != "sampling" and value is not None}
        return replace(base, **given)


def run(
    model: Model,
    prompt: Prompt,
    where: Where = Where(),
    pruning: Pruning = Pruning(),
    sampling: Sampling = Sampling(),
    *,
    keep_ratio: KeepRatio = None,
    stop: Annotated[tuple[str, ...], Parameter(group=_SAMPLING, allow_leading_hyphen=True)] = (),
    skip_special_tokens: Annotated[bool, Parameter(group=OUTPUT, negative="--no-skip-special-tokens")] = True,
    no_stream: Annotated[bool, Parameter(group=OUTPUT)] = False,
    picture: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    json: Json = False,
) -> int:
    """Answer a prompt about images and videos, with few of their tokens.

    Example: hawk-trt run artifacts/3b --image photo.jpg --prompt "What does the sign say?" --keep-ratio 0.2

    Args:
        keep_ratio: share of visual tokens kept, in (0, 1] (default: the bundle's)
        stop: end the answer at this text; repeatable
        skip_special_tokens: leave special tokens out of the answer
        no_stream: print the answer when it is whole
        picture: PNG file, to draw the kept tokens
        json: print the whole result as JSON
    """
    # All that can be refused without the model is refused before it is loaded.
    pruning.config(keep_ratio)
    sampling.config()
    text = prompt.text()
    pipe = where.open(model)
    config = pruning.config(keep_ratio, pipe.bundle)
    messages = prompt.messages(text)
    stream = pipe.stream(
        messages,
        pruning=config,
        max_new_tokens=prompt.max_new_tokens,
        sampling=sampling.config(pipe.bundle),
        stop=stop,
        skip_special_tokens=skip_special_tokens,
        **prompt.media,
    )
    live = sys.stdout.isatty() and not (no_stream or json)
    line_begun = False
    try:
        for piece in stream:
            if live:
                print(piece, end="", flush=True)
                line_begun = True
    finally:
        if line_begun:
            print()
    result = stream.result
    drawn = picture if result.num_visual else None
    if json:
        shown = {"keep_ratio": config.keep_ratio, "picture": None if drawn is None else str(drawn)}
        print_json(replace(result, logits=None), shown)
    elif not live:
        print(result.text, flush=True)
    if drawn is not None:  # after the answer, which a picture that cannot be written must not cost
        from hawk_trt.apps.cli.explain import draw, lay_out  # a tenth of a start is for those who draw

        inputs = pipe.prepare(messages, **prompt.media)
        explained = lay_out(pipe, text, inputs, [(config.keep_ratio, result)], pruning)
        draw(drawn, explained, prompt, pruning, pipe)
    _summarise(result)
    if picture is not None:
        note(f"picture        {drawn or 'not drawn: there are no visual tokens'}")
    return 0


def _summarise(result: Result) -> None:
    """The note after an answer: visual tokens kept, time by stage, and how it ended."""
    if result.num_visual:
        share = 100.0 * result.num_kept / result.num_visual
        note(f"visual tokens  {result.num_kept} kept of {result.num_visual} ({share:.1f} %)")
    else:
        note("visual tokens  none in this prompt, so nothing was pruned")
    stages = [(field.name, 1000.0 * getattr(result.timings, field.name)) for field in fields(Timings)]
    note("time in ms     " + ", ".join(f"{name} {latency_ms:.1f}" for name, latency_ms in stages))
    tokens = len(result.token_ids)
    end = "stopped at --max-new-tokens" if result.finish_reason == "length" else "complete"
    note(f"answer         {tokens} token{'s' * (tokens != 1)}, {end}")
