"""Who does the units of work: a loaded model that answers with single heads left out.

    out_i = 0 for the row's head i, before o_proj          in the scoring layer, or in every layer of full attention

The same prompt lies side by side in several rows, each without another head. A row costs what an answer costs; image,
prompt and the choice of tokens are made once for all rows. In a calibration only this file imports torch.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hawk_trt.apps.calibrate.work import BASELINE, FIRST_LAYER, Model, Plan, Question, Scores, Unit
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.processor import Processor
from hawk_trt.models import load_family
from hawk_trt.request import PruningConfig, Request


class Worker:
    """A loaded model that does units. Loading takes seconds to minutes."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        bundle = plan.open(plan.checkpoint)
        manifest = bundle.manifest
        self._stop = manifest.special_tokens.eos
        self._tokens = plan.special_tokens(bundle)
        self._processor = Processor(bundle, load_family(manifest.vision))
        weights = manifest.head_weights.values
        self._pruning = PruningConfig(keep_ratio=plan.keep_ratio, head_weights=weights)
        self._model = plan.load(
            plan.checkpoint,
            head_weights=weights,
            normalization=manifest.normalization,
            device=plan.device,
            dtype=plan.dtype,
        )
        self._question: Question | None = None
        self._prompt: Any = None
        self._kept: list[int] = []

    @torch.inference_mode()
    def do(self, unit: Unit) -> tuple[Unit, Scores]:
        """Answer and score.

        Raises:
            InvalidInput: an image or video that cannot be used.
        """
        source = self._plan.sources[unit.source]
        question = source.questions[unit.number]
        if question is not self._question:
            try:
                self._prepare(question)
            except InvalidInput as error:
                raise InvalidInput(f"{source.name}, sample {question.id}: {error}") from error
        with without_heads(self._model, self._plan.scope, unit.heads):
            tokens = answer(
                self._model, self._prompt, self._kept, len(unit.heads), self._plan.max_new_tokens, self._stop
            )
        chat = self._processor.chat
        assert chat is not None  # the plan's open refuses a checkpoint without a tokenizer
        answers = tuple(str(chat.tokenizer.decode(ids)) for ids in tokens)
        return unit, Scores(question.id, unit.heads, tuple(source.score(one, question) for one in answers), answers)

    def _prepare(self, question: Question) -> None:
        """Make of a question what all of its units share."""
        request = Request(question.prompt, question.images, question.videos, max_pixels=self._plan.max_pixels)
        inputs = self._processor(request)
        self._prompt = self._model.embed(inputs, self._tokens)
        self._kept = self._model.kept(self._prompt, self._pruning)
        self._question = question


def answer(
    model: Model,
    prompt: Any,  # noqa: ANN401
    kept: Sequence[int],
    rows: int,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
) -> list[list[int]]:
    """Answer one prompt of model.embed greedily in so many rows: token ids of each, without the stop token.

    kept: positions of the prompt that the decoder sees, ascending.
    """
    answers: list[list[int]] = [[] for _ in range(rows)]
    unfinished = set(range(rows))
    decoding = model.decode(prompt, kept, rows)
    chosen = next(decoding).argmax(-1)
    while True:
        for row, token in enumerate(chosen.tolist()):
            if token in stop_tokens:
                unfinished.discard(row)
            elif row in unfinished:
                answers[row].append(token)
        if not unfinished or max(map(len, answers)) == max_new_tokens:
            return answers
        chosen = decoding.send(chosen).argmax(-1)


@contextmanager
def without_heads(model: Model, scope: str, heads: Sequence[int]) -> Iterator[None]:
    """Zero what each row's head hands to o_proj; BASELINE leaves out nothing.

    The linear layers of a hybrid model have no such heads: its first layer here is its first of full attention.
    """
    language = model.language
    num_heads = int(language.config.num_attention_heads)
    projections = [layer.self_attn.o_proj for layer in language.layers if hasattr(layer, "self_attn")]
    hooks = []
    try:
        for projection in projections[: 1 if scope == FIRST_LAYER else None]:
            dropped = torch.zeros(len(heads), 1, num_heads, projection.in_features // num_heads, dtype=torch.bool)
            for row, head in enumerate(heads):
                if head != BASELINE:
                    dropped[row, :, head] = True
            mask = dropped.flatten(2).to(projection.weight.device)
            hooks.append(projection.register_forward_pre_hook(partial(_zero, mask)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zero(mask: Tensor, _: torch.nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].masked_fill(mask, 0.0), *inputs[1:])
