"""The PyTorch reference: the checkpoint's own model with HAWK inserted in plain, unabsorbed form.

ModelInputs and a PruningConfig enter, a ReferenceTrace leaves. Every query and key projection is
computed for every token and the whole decoder runs on the kept ones, straight from the method's equations:

    q_i(t) = (Wq h_t + bq)_i      k_g(n) = (Wk h_n + bk)_g      h = layer 0's input norm of the embeddings
    s_i(n) = mean_t q_i(t) . k_g(n) / sqrt(head_dim), no RoPE, NaN and infinities -> 0, normalised over n
    score(n) = sum_i w_i s_i(n)

In a hybrid model the first layer L of full attention takes the place of layer 0. The layers before it run on every
token, so h is L's input norm of what they give, and the rest of the decoder runs on what they give of the kept tokens.

Only this file and reference_models.py, which knows the families, import torch and transformers.
"""

import logging
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.apps.parity.compare import ReferenceTrace
from hawk_trt.apps.parity.prompt_rules import PromptTokens, VisualItem, frame_numbers, keep_best, query_range
from hawk_trt.errors import BackendError, CheckpointError, ParityError
from hawk_trt.request import ModelInputs, PruningConfig

try:
    import torch
    from safetensors import SafetensorError
    from torch import Tensor
    from torch.nn.functional import linear
    from transformers import AutoConfig, DynamicCache
    from transformers.utils import logging as transformers_logging

    from hawk_trt.apps.parity.reference_models import FAMILIES, Qwen25VL
except ImportError as error:
    raise ParityError(
        f"the PyTorch reference needs torch and transformers ({error}): pip install torch transformers safetensors"
    ) from error


@dataclass(frozen=True, slots=True)
class EmbeddedPrompt:
    """A prompt before layer 0, without its masked positions; made once, run with several prunings."""

    ids: list[int]  # [seq_len]
    places: npt.NDArray[np.int64]  # [seq_len], where each token stood in the prompt as given
    visual: list[int]  # positions of the visual tokens among ids
    owners: list[int]  # of each visual token its image or video
    frames: list[int]  # and its image or frame, counted through all of them
    embeds: Tensor  # [seq_len, hidden], visual embeddings merged in
    deepstack: tuple[Tensor, ...]  # [num_visual, hidden] of each DeepStack level, nothing where the family has none
    position_ids: Tensor  # int64 [axes, seq_len]
    tokens: PromptTokens


class Reference:
    """A checkpoint's PyTorch model, run with HAWK."""

    def __init__(self, model: Qwen25VL, head_weights: Sequence[float], normalization: str) -> None:
        self.model = model
        self._head_weights = tuple(head_weights)
        self._normalization = normalization

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        head_weights: Sequence[float],
        normalization: str,
        device: str = "cpu",
        dtype: str = "float32",
        settings: dict[str, Any] | None = None,
        weights: Callable[[str], Iterator[npt.NDArray[Any]] | None] | None = None,
    ) -> "Reference":
        """Load the checkpoint folder, or hub id, that a bundle was exported from.

        Scores are computed in float32 whatever the dtype, with head_weights where a PruningConfig has none. settings:
        of config.json, where transformers cannot read it. weights: a tensor's values by the model's name of it, in 1-D
        parts, None of one that is not there; without it transformers reads the files, which takes the package that
        wrote them where they are quantised.

        Raises:
            HawkError: it cannot be read, is incomplete or of another architecture, or torch lacks the device.
        """
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity(logging.ERROR)  # its notes on config keys are of no use here
        try:
            config = (
                AutoConfig.from_pretrained(str(checkpoint)) if settings is None else AutoConfig.for_model(**settings)
            )
            model_type = config.model_type
            if model_type not in FAMILIES:
                raise CheckpointError(f"model_type: got {model_type!r}, the reference knows {', '.join(FAMILIES)}")
            model_class, torch_dtype = FAMILIES[model_type].model_class, getattr(torch, dtype)
            source: dict[str, Any] = {"pretrained_model_name_or_path": str(checkpoint)}
            if weights is not None:
                for part in (config, config.get_text_config()):
                    vars(part).pop("quantization_config", None)
                with torch.device("meta"):
                    empty = model_class(config)
                state = _state(empty, weights, torch_dtype)
                source = {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}
            model, info = model_class.from_pretrained(**source, dtype=torch_dtype, output_loading_info=True)
        except (ImportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{checkpoint}: transformers cannot load it ({error})") from error
        finally:
            transformers_logging.set_verbosity(verbosity)
        # transformers fills in missing weights at random and goes on.
        wrong = sorted({*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])})
        if wrong:
            raise CheckpointError(f"{checkpoint}: its weights do not fit its config: {wrong[0]} ({len(wrong)} in all)")
        try:
            model = model.eval().to(device)
        except (RuntimeError, AssertionError) as error:
            raise BackendError(f"torch cannot use device {device!r} ({error})") from error
        return cls(FAMILIES[model_type](model), head_weights, normalization)

    @property
    def language(self) -> Any:  # noqa: ANN401 - the language models share no base
        """The language model, with layers, embed_tokens and config."""
        return self.model.language

    @torch.inference_mode()
    def embed(self, inputs: ModelInputs, tokens: PromptTokens) -> EmbeddedPrompt:
        """Run the vision tower and merge its embeddings into the prompt's, whose placeholders and grids must fit."""
        all_ids = np.ravel(np.asarray(inputs.input_ids, dtype=np.int64))
        mask = np.ones_like(all_ids) if inputs.attention_mask is None else np.ravel(np.asarray(inputs.attention_mask))
        images, videos = self.model.items(inputs)
        owner_of, items = _owners(all_ids.tolist(), images, videos, tokens)
        shown = mask != 0
        places = np.flatnonzero(shown)
        ids = all_ids[places].tolist()
        visual = [position for position, place in enumerate(places) if owner_of[place] >= 0]
        owners = [owner_of[places[position]] for position in visual]
        frame_of = frame_numbers(owner_of, items)
        frames = [frame_of[places[position]] for position in visual]

        language = self.model.language
        embeds = language.embed_tokens(torch.tensor(ids, device=language.embed_tokens.weight.device))
        deepstack: tuple[Tensor, ...] = ()
        if visual:
            image_embeds, video_embeds = self.model.embed(inputs)
            all_rows = torch.cat([(video_embeds if item.is_video else image_embeds).pop(0) for item in items])
            placeholders = [place for place, owner in enumerate(owner_of) if owner >= 0]
            own_rows = all_rows[np.flatnonzero(shown[placeholders])].to(embeds.dtype)
            embeds[visual], *levels = own_rows.view(len(visual), -1, embeds.shape[1]).unbind(1)
            deepstack = tuple(levels)
        # A masked token takes no position, but a partly masked image or video keeps its whole grid.
        placed = [place for place, owner in enumerate(owner_of) if shown[place] or owner in owners]
        positions = self.model.positions([owner_of[place] for place in placed], items)
        position_ids = torch.tensor(positions, device=embeds.device)[np.flatnonzero(shown[placed])].T
        return EmbeddedPrompt(ids, places, visual, owners, frames, embeds, deepstack, position_ids, tokens)

    @torch.inference_mode()
    def run(
        self,
        prompt: EmbeddedPrompt,
        pruning: PruningConfig,
        *,
        steps: int = 1,
        forced_tokens: Sequence[int] | None = None,
        kept_indices: Sequence[int] | None = None,
    ) -> ReferenceTrace:
        """Prune, prefill and decode; end-of-answer tokens do not end it.

        So many steps are chosen greedily, or are the forced_tokens, whatever the logits say (teacher forcing);
        kept_indices, positions of the prompt as given, are kept whatever the scores say.
        """
        query, raw, scores = self._scores(prompt, pruning)
        groups = _groups(prompt, pruning)
        ordinals = keep_best(scores.tolist(), groups, pruning)
        if kept_indices is not None:
            wanted = set(np.flatnonzero(np.isin(prompt.places, kept_indices)).tolist())
            ordinals = [n for n, position in enumerate(prompt.visual) if position in wanted]
        dropped = set(prompt.visual) - {prompt.visual[n] for n in ordinals}
        kept = [position for position in range(len(prompt.ids)) if position not in dropped]
        entered: list[Tensor] = []
        behind = self.language.layers[self.model.scoring_layer + 1]
        hook = behind.register_forward_pre_hook(lambda _module, args: entered.append(args[0]))
        try:
            decoding = self.decode(prompt, kept)
            logits = [next(decoding)[0]]
            tokens = list(map(int, forced_tokens or [int(logits[0].argmax())]))
            for step in range(1, steps if forced_tokens is None else len(tokens)):
                logits.append(decoding.send(torch.tensor(tokens[step - 1 : step], device=logits[0].device))[0])
                if forced_tokens is None:
                    tokens.append(int(logits[-1].argmax()))
        finally:
            hook.remove()
        return ReferenceTrace(
            visual_embeds=_numpy(prompt.embeds[prompt.visual]),
            inputs_embeds=_numpy(prompt.embeds),
            head_scores=_numpy(raw),
            scores=_numpy(scores),
            visual_indices=prompt.places[prompt.visual],
            topk_groups=np.asarray(groups, dtype=np.int64),
            kept_visual=np.asarray(ordinals, dtype=np.int64),
            kept_indices=prompt.places[kept],
            query_indices=prompt.places[query],
            hidden_states=_numpy(entered[0][0]),
            position_ids=prompt.position_ids.cpu().numpy(),
            kept_position_ids=prompt.position_ids[:, kept].cpu().numpy(),
            logits=_numpy(torch.stack(logits)),
            tokens=tuple(tokens),
        )

    @torch.inference_mode()
    def decode(self, prompt: EmbeddedPrompt, kept: Sequence[int], rows: int = 1) -> Generator[Tensor, Tensor, None]:
        """Prefill with the kept positions, then decode step by step, the same prompt in so many rows.

        Yields:
            Logits [rows, vocab] float32; send the tokens [rows] that the rows go on with.
        """
        model, language = self.model, self.language
        cache, first, count = DynamicCache(config=language.config), model.scoring_layer, len(language.layers)
        x = prompt.embeds.expand(rows, -1, -1)
        if first:  # a hybrid model's layers before the scoring layer see every token
            x = model.layers(x, prompt.position_ids, range(first), cache)
        x, positions = x[:, kept], prompt.position_ids[:, kept]
        deepstack: dict[str, Any] = {}
        if prompt.deepstack:
            visual, still_there = set(prompt.visual), set(kept)
            ordinals = [n for n, position in enumerate(prompt.visual) if position in still_there]
            mask = torch.tensor([[position in visual for position in kept]], device=x.device)
            levels = [level[ordinals].repeat(rows, 1) for level in prompt.deepstack]
            deepstack = {"visual_pos_masks": mask.expand(rows, -1), "deepstack_visual_embeds": levels}
        following = int(prompt.position_ids.max()) + 1  # of the unpruned prompt: what comes next keeps its place
        layers = range(first, count)
        while True:
            if first:
                x = language.norm(model.layers(x, positions, layers, cache))
            else:
                places = positions[:, None].expand(-1, rows, -1)  # [axes, rows, n]
                x = language(
                    inputs_embeds=x,
                    position_ids=places if len(places) > 1 else places[0],  # 1-D models take no axis
                    past_key_values=cache,
                    use_cache=True,
                    **deepstack,
                ).last_hidden_state
            tokens = yield model.lm_head(x[:, -1]).float()
            layers, deepstack = range(count), {}  # what is generated is text, and goes through all layers
            x = language.embed_tokens(tokens)[:, None]
            positions = torch.full((len(positions), 1), following, device=x.device)
            following += 1

    def _scores(self, prompt: EmbeddedPrompt, pruning: PruningConfig) -> tuple[list[int], Tensor, Tensor]:
        """Positions of the query, scores of each head [heads, num_visual] and what ranks the visual tokens."""
        query = query_range(prompt.ids, prompt.visual, prompt.tokens, pruning.query or "paper") if prompt.visual else []
        before = range(self.model.scoring_layer)
        x = self.model.layers(prompt.embeds[None], prompt.position_ids, before, None)[0] if before else prompt.embeds
        raw = self._head_scores(x, query, prompt.visual)
        weights = torch.tensor(pruning.head_weights or self._head_weights, dtype=raw.dtype, device=raw.device)
        return query, raw, (weights[:, None] * _normalize(raw, self._normalization)).sum(0)

    def _head_scores(self, embeds: Tensor, query: list[int], visual: list[int]) -> Tensor:
        # float32 throughout, as the method asks: bfloat16 scores lose up to a fifth of the kept set.
        layer = self.model.language.layers[self.model.scoring_layer]
        attention = layer.self_attn
        head_dim = int(attention.head_dim)
        hidden = layer.input_layernorm(embeds.float())

        def heads_of(name: str, count: int) -> Tensor:
            projection, norm = getattr(attention, f"{name}_proj"), getattr(attention, f"{name}_norm", None)
            bias = None if projection.bias is None else projection.bias.float()
            projected = linear(hidden, projection.weight.float(), bias).view(len(embeds), count, -1)
            projected = projected[..., :head_dim]  # behind a query there may be its gate
            return projected if norm is None else norm(projected)

        heads, kv_heads = (p // head_dim for p in (attention.o_proj.in_features, attention.k_proj.out_features))
        q, k, group = heads_of("q", heads), heads_of("k", kv_heads), heads // kv_heads
        scores = [(q[query, head] @ k[visual, head // group].T / math.sqrt(head_dim)).mean(0) for head in range(heads)]
        return torch.nan_to_num(torch.stack(scores), nan=0.0, posinf=0.0, neginf=0.0)


def _state(
    model: torch.nn.Module, weights: Callable[[str], Iterator[npt.NDArray[Any]] | None], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a model that has none of its own yet (device meta)."""
    state = {}
    for name, like in model.state_dict().items():
        if (parts := weights(name)) is not None:
            state[name] = torch.empty(like.shape, dtype=dtype)
            flat, filled = state[name].view(-1), 0
            for part in parts:
                flat[filled : filled + len(part)] = torch.from_numpy(part.astype(np.float32))
                filled += len(part)
    return state


def _groups(prompt: EmbeddedPrompt, pruning: PruningConfig) -> list[int]:
    """Of each visual token, the top-k that it competes in."""
    everyone = [0] * len(prompt.visual)
    return {"global": everyone, "per-image": prompt.owners, "per-frame": prompt.frames}[pruning.quota]


def _normalize(raw: Tensor, normalization: str) -> Tensor:
    """Normalise each head's scores [heads, num_visual] over the visual tokens."""
    if raw.shape[1] == 0:
        return raw
    if normalization == "l2":
        return raw / raw.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    if normalization == "softmax":
        return raw.softmax(1)
    low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
    return (raw - low) / (high - low).clamp_min(torch.finfo(torch.float32).eps)


def _owners(
    ids: Sequence[int], images: Sequence[VisualItem], videos: Sequence[VisualItem], tokens: PromptTokens
) -> tuple[list[int], list[VisualItem]]:
    """Item of each token (-1 for text), and the items in the order of the prompt."""
    owners: list[int] = []
    items: list[VisualItem] = []
    left = 0
    waiting = {False: list(images), True: list(videos)}
    for token in ids:
        if token not in (tokens.image, tokens.video):
            owners.append(-1)
            continue
        is_video = token == tokens.video
        if left == 0:
            if not waiting[is_video]:
                raise ParityError(
                    f"input_ids: more placeholders than the {len(images)} images and {len(videos)} videos take"
                )
            items.append(waiting[is_video].pop(0))
            left = items[-1].num_tokens
        if items[-1].is_video != is_video:
            raise ParityError(
                "input_ids: an image's or a video's placeholders end early, expected as many as its grid says"
            )
        owners.append(len(items) - 1)
        left -= 1
    if left or waiting[False] or waiting[True]:
        raise ParityError("input_ids: fewer placeholders than image_grid_thw and video_grid_thw say")
    return owners, items


def _numpy(tensor: Tensor) -> npt.NDArray[np.float32]:
    return tensor.float().cpu().numpy()
