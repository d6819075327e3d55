"""Who does the units of work: a loaded model that answers with single heads left out.

    out_i = 0 for the row's head i, before o_proj          in the scoring layer, or in every layer of full attention

The same prompt lies side by side in several rows, each without another head. A row costs what an answer costs; image
and prompt are made once for all rows. In a calibration only this file imports torch.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hawk_trt.apps.evaluate.calibration import BASELINE, FIRST_LAYER, Plan, Scores, Unit
from hawk_trt.apps.evaluate.datasets import Sample
from hawk_trt.apps.evaluate.metrics import METRICS
from hawk_trt.errors import BackendError, HawkError, InvalidInput
from hawk_trt.inputs.processor import Processor
from hawk_trt.models import load_family
from hawk_trt.request import Request


class Worker:
    """A loaded model that does units. Loading takes seconds to minutes."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        bundle = plan.open(plan.checkpoint)
        manifest = bundle.manifest
        self._stop = manifest.special_tokens.eos
        self._tokens = plan.special_tokens(bundle)
        self._processor = Processor(bundle, load_family(manifest.vision))
        self._model = plan.load(
            plan.checkpoint,
            head_weights=manifest.head_weights.values,
            normalization=manifest.normalization,
            device=plan.device,
            dtype=plan.dtype,
        )
        self._question: Sample | None = None
        self._prompt: Any = None

    @torch.inference_mode()
    def do(self, unit: Unit) -> tuple[Unit, Scores]:
        """Answer and score; InvalidInput names the question whose image or video cannot be used."""
        source = self._plan.sources[unit.source]
        question = source.questions[unit.number]
        if question is not self._question:
            try:
                self._prepare(question)
            except InvalidInput as error:
                raise InvalidInput(f"{source.name}, sample {question.id}: {error}") from error
        with without_heads(self._model, self._plan.scope, unit.heads):
            tokens = answer(self._model, self._prompt, len(unit.heads), self._plan.max_new_tokens, self._stop)
        chat = self._processor.chat
        assert chat is not None  # the plan's open refuses a checkpoint without a tokenizer
        answers = tuple(str(chat.tokenizer.decode(ids)) for ids in tokens)
        scores = tuple(METRICS[source.metric](one, question) for one in answers)
        return unit, Scores(question.id, unit.heads, scores, answers)

    def _prepare(self, question: Sample) -> None:
        """Make of a question what all of its units share."""
        request = Request(question.prompt, question.images, question.videos, max_pixels=self._plan.max_pixels)
        inputs = self._processor(request)
        self._prompt = self._model.embed(inputs, self._tokens)
        self._question = question


def do_on_ray(plan: Plan, units: Sequence[Unit], shards: int, address: str | None) -> Iterator[tuple[Unit, Scores]]:
    """Do all units on a Ray cluster, in whatever order they end; a lost machine's unit is done again by a new worker.

    Results come back here, so that one process writes them. The checkpoint and the pictures must lie at the same paths
    on every machine. shards: workers side by side, each with a model of its own, on a GPU of its own where the plan
    names one. address: None is RAY_ADDRESS, else a cluster that runs on this machine, else one that is started here.
    """
    try:
        import ray  # only those who ask for shards need it
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool
    except ImportError as error:
        raise InvalidInput(f"--shards needs Ray ({error}): pip install ray") from error
    gpus = int(plan.device.startswith("cuda"))
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BackendError(f"Ray: no cluster at {address or os.environ.get('RAY_ADDRESS')} ({error})") from error
    try:
        resources = ray.cluster_resources()
        for name, needed in (("GPU", gpus * shards), ("CPU", shards)):
            if resources.get(name, 0) < needed:
                raise BackendError(
                    f"--shards {shards}: needs {needed} {name}s, the Ray cluster has {resources.get(name, 0):g}"
                )
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(Worker)
        pool = ActorPool([remote.remote(plan) for _ in range(min(shards, len(units)))])
        yield from pool.map_unordered(lambda worker, unit: worker.do.remote(unit), units)
    except RayTaskError as error:
        if isinstance(error.cause, HawkError):
            raise error.cause from error
        raise BackendError(f"Ray: a worker failed ({error.cause!r}). HAWK_DEBUG=1 shows where") from error
    except RayError as error:
        raise BackendError(f"Ray: {error}. What was answered is kept; go on with the same command") from error
    finally:
        ray.shutdown()


def answer(
    model: Any,  # noqa: ANN401 - parity's Reference, as in without_heads
    prompt: Any,  # noqa: ANN401
    rows: int,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
) -> list[list[int]]:
    """Answer one prompt of model.embed greedily in so many rows: token ids of each, without the stop token."""
    answers: list[list[int]] = [[] for _ in range(rows)]
    unfinished = set(range(rows))
    decoding = model.decode(prompt, range(len(prompt.ids)), rows)
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
def without_heads(model: Any, scope: str, heads: Sequence[int]) -> Iterator[None]:  # noqa: ANN401
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
