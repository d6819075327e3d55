"""The steps: what is learnt, saved as it goes, and the same to the last bit after a kill.

A step depends on the seed, the stage and its number alone, never on how often the run was begun again.
"""

import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Muon, Optimizer
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration, Qwen3_5ForConditionalGeneration

from examples.tiny_task import QUESTION_KINDS
from examples.tiny_training.cell_heads import CellHeads
from examples.tiny_training.hybrid import HybridNetwork
from examples.tiny_training.lessons import Teacher
from examples.tiny_training.network import Network
from examples.tiny_training.recipe import LARGEST_GRADIENT, LAST_SHARE, WARM_UP, WEIGHT_DECAY, Pictures, Stage
from hawk_trt.errors import InvalidInput
from hawk_trt.files.staging import write_atomically

_LOG_EVERY, _SAVE_EVERY, _ASK_EVERY = 50, 100, 400
_HELD_OUT = 1_000_000  # a step that no stage reaches: its pictures are for the log alone
ARCHITECTURES: dict[str, tuple[Any, type[Network]]] = {
    "qwen2_5_vl": (Qwen2_5_VLForConditionalGeneration, Network),
    "qwen3_5": (Qwen3_5ForConditionalGeneration, HybridNetwork),
}
_STEP_SIZES = (0.001, 0.1)  # of a gated delta net's first step sizes, the shortest and the longest


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a run is: the next step of a stage."""

    stage: int
    step: int


class Trainer:
    """One training run, in a folder that a killed one is gone on with.

    Attributes:
        model: transformers' own, float32.
    """

    def __init__(self, like: Path, work: Path, seed: int, stages: Sequence[Stage], say: Callable[[str], None]) -> None:
        """Prepare a run, or go on with one.

        Args:
            like: checkpoint folder whose config, tokenizer and image settings the new model has.
            work: folder of the run's state.
            seed: of the first weights and of all lessons.
            stages: what is learnt.
            say: takes each line of the log.

        Raises:
            InvalidInput: the folder holds a run of another seed or recipe.
        """
        torch.manual_seed(seed)
        config = AutoConfig.from_pretrained(like, dtype="float32")
        architecture, network = ARCHITECTURES[config.model_type]
        self.model = architecture(config)
        _spread_memories(self.model)
        self._network = network(self.model)
        self._heads = CellHeads(self._network.hidden)
        self._teacher = Teacher(like)
        self._stages = tuple(stages)
        self._seed = seed
        self._say = say
        self._path = work / "state.pt"
        self._subject = f"seed {seed}, {config.model_type}, {self._stages}"
        self._place = _Place(0, 0)
        self._optimizers = self._new_optimizers(self._stages[0])
        if self._path.exists():
            self._load()

    def run(self) -> None:
        """Do all steps that are left."""
        began, losses = time.monotonic(), list[float]()
        for place in self._left():
            stage = self._stages[place.stage]
            if place.step == 0:
                self._optimizers = self._new_optimizers(stage)
                losses.clear()
            losses.append(self._step(place, stage))
            done, last = place.step + 1, place.step + 1 == stage.steps
            self._place = _Place(place.stage, done)
            if done % _LOG_EVERY == 0 or last:
                seconds = time.monotonic() - began
                loss = np.mean(losses[-_LOG_EVERY:])
                self._say(f"{stage.name}: step {done} of {stage.steps}, loss {loss:.4f}, {seconds:.0f} s")
            if done % _SAVE_EVERY == 0 or last:
                self._save()
            if done % _ASK_EVERY == 0 or last:
                self._say(f"{stage.name}: held out: {self._held_out(place.stage, stage)}")

    def _left(self) -> Iterator[_Place]:
        for number in range(self._place.stage, len(self._stages)):
            first = self._place.step if number == self._place.stage else 0
            yield from (_Place(number, step) for step in range(first, self._stages[number].steps))

    def _rng(self, stage: int, step: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, stage, step])

    def _step(self, place: _Place, stage: Stage) -> float:
        rate = stage.learning_rate * _share(place.step, stage)
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group in groups:
            group["lr"] = rate
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        pictures = stage.cycle[place.step % len(stage.cycle)]
        loss = self._loss(self._rng(place.stage, place.step), stage, pictures)
        loss.backward()
        clip_grad_norm_([parameter for group in groups for parameter in group["params"]], LARGEST_GRADIENT)
        for optimizer in self._optimizers:
            optimizer.step()
        return float(loss.detach())

    def _loss(self, rng: np.random.Generator, stage: Stage, pictures: Pictures) -> Tensor:
        if stage.trains == "vision":
            patches, cells = self._teacher.cells(rng, pictures, stage.straddling)
            return self._heads.loss(self._network.visual_tokens(patches), cells)
        patches, packed = self._teacher.questions(rng, pictures, stage.straddling, stage.hiding)
        with torch.no_grad():
            visual = self._network.visual_tokens(patches)
        logits, wanted = self._network.answer_logits(visual, packed)
        return functional.cross_entropy(logits, packed.labels[wanted])

    def _held_out(self, number: int, stage: Stage) -> str:
        """Shares of right labels, or of right answers (of all, then by kind), by size, aligned and straddling."""
        found = []
        for pictures in sorted(set(stage.cycle), key=lambda pictures: (pictures.size, pictures.things)):
            for straddling in (0.0, 1.0):
                right = " ".join(f"{share:.2f}" for share in self._right(number, stage, pictures, straddling))
                found.append(f"{pictures.size} px{' straddling' if straddling else ''} {right}")
        return ", ".join(found)

    @torch.no_grad()
    def _right(self, number: int, stage: Stage, pictures: Pictures, straddling: float) -> list[float]:
        rng = self._rng(number, _HELD_OUT)
        if stage.trains == "vision":
            patches, cells = self._teacher.cells(rng, pictures, straddling)
            return list(self._heads.right(self._network.visual_tokens(patches), cells))
        patches, packed = self._teacher.questions(rng, pictures, straddling)
        logits, wanted = self._network.answer_logits(self._network.visual_tokens(patches), packed)
        right = torch.ones_like(wanted)
        right[wanted] = logits.argmax(-1) == packed.labels[wanted]
        answers = right.all(-1)
        by_kind = (answers[packed.kinds == kind] for kind in range(len(QUESTION_KINDS)))
        return [float(some.float().mean()) for some in (answers, *by_kind)]

    def _new_optimizers(self, stage: Stage) -> list[Optimizer]:
        """AdamW, and Muon for the matrices of the language model."""
        if stage.trains == "vision":
            parts: list[nn.Module] = [self.model.model.visual, self._heads]
        else:
            parts = [self.model.model.language_model]
        muon, decayed, plain = list[nn.Parameter](), list[nn.Parameter](), list[nn.Parameter]()
        for part in parts:
            for name, parameter in part.named_parameters():
                if parameter.dim() < 2 or name.startswith(("embed_tokens", "pos_embed")) or "conv1d" in name:
                    plain.append(parameter)
                elif stage.trains == "language":
                    muon.append(parameter)
                else:
                    decayed.append(parameter)
        groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
        adam = AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98))
        if not muon:
            return [adam]
        return [adam, Muon(muon, momentum=0.95, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")]

    def _save(self) -> None:
        state = {
            "subject": self._subject,
            "place": (self._place.stage, self._place.step),
            "model": self.model.state_dict(),
            "heads": self._heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(self._path, content.getvalue())

    def _load(self) -> None:
        state = torch.load(self._path, weights_only=True)
        if state["subject"] != self._subject:
            raise InvalidInput(
                f"{self._path}: got a run of {state['subject']}, expected {self._subject}. Choose another --work"
            )
        self.model.load_state_dict(state["model"])
        self._heads.load_state_dict(state["heads"])
        self._place = _Place(*state["place"])
        stage = self._stages[self._place.stage]
        self._optimizers = self._new_optimizers(stage)
        for optimizer, held in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(held)
        self._say(f"{self._path}: going on after step {self._place.step} of {stage.name}")


def _spread_memories(model: nn.Module) -> None:
    """Let each gated delta net begin with heads that forget at once and heads that keep hundreds of tokens.

    transformers begins with all step sizes alike, as a checkpoint overwrites them; most heads would keep two tokens.
    """
    shortest, longest = (math.log(size) for size in _STEP_SIZES)
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            sizes = torch.empty_like(parameter).uniform_(shortest, longest).exp()
            parameter.data = sizes.expm1().log()  # whose softplus the sizes are


def _share(step: int, stage: Stage) -> float:
    """Of the learning rate at a step: it rises, stays, and falls."""
    rising = (step + 1) / WARM_UP
    falling = (stage.steps - step) / (stage.falling * stage.steps) if stage.falling else 1.0
    return max(LAST_SHARE, min(1.0, rising, falling))
