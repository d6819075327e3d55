"""FastV (Chen et al., 2024) in PyTorch: the tokens are dropped inside the decoder, so no bundle can run it.

    phi(n)  mean over heads of layer K-1's softmax attention from the last prompt token to visual token n, K = 2
    kept    after layer K-1, all text tokens and the visual tokens of largest phi; layers 0 to K-1 see every token

The vision stage, the embeddings and the positions are the pipeline's; the decoder is the checkpoint's own, which the
caller loads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hawk_trt.apps.evaluate.metrics import Metric
from hawk_trt.apps.evaluate.trials import Answerer, Cell, PreparedSample, Trial
from hawk_trt.bundle import Manifest
from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.layout import PromptLayout
from hawk_trt.pruning import kept_count
from hawk_trt.pruning.selectors import best
from hawk_trt.request import PruningConfig

try:
    import torch
    from torch import Tensor
    from transformers import DynamicCache
except ImportError as error:
    raise InvalidInput(
        f"selector fastv needs torch and transformers ({error}): pip install torch transformers safetensors"
    ) from error

if TYPE_CHECKING:
    from hawk_trt.pipeline import Pipeline

FULL_LAYERS = 2  # K


@dataclass(frozen=True, slots=True)
class FastVAnswer:
    """One answer: its tokens, kept positions of the prompt, phi of the visual tokens and logits of every step."""

    token_ids: list[int]
    kept: npt.NDArray[np.int64]
    phi: npt.NDArray[np.float32]
    logits: npt.NDArray[np.float32]


class FastV:
    """A checkpoint's decoder with FastV in it; batches of one."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 - parity's, of which it takes layers, language and lm_head
        self._layers, self._language, self._lm_head = model.layers, model.language, model.lm_head
        self._language.set_attn_implementation("eager")  # which gives its weights

    @torch.inference_mode()
    def answer(
        self,
        prompt: PromptLayout,
        visual_embeds: npt.NDArray[np.float32],
        num_kept: int,
        max_new_tokens: int,
        stop_tokens: Sequence[int],
    ) -> FastVAnswer:
        """Answer one prompt greedily; visual_embeds: (num_visual, hidden) float32, in the order of the prompt."""
        device = self._lm_head.weight.device
        visual = prompt.visual_rows >= 0
        embeds = self._language.embed_tokens(torch.tensor(prompt.input_ids, device=device))
        embeds[torch.tensor(visual, device=device)] = torch.tensor(visual_embeds, device=device)
        positions = torch.tensor(prompt.position_ids, device=device)
        cache = DynamicCache(config=self._language.config)
        hidden, kept, phi = self._prefill(embeds, positions, visual, num_kept, cache)
        tokens: list[int] = []
        logits: list[Tensor] = []
        while True:
            logits.append(self._lm_head(self._language.norm(hidden[:, -1]))[0])
            tokens.append(int(logits[-1].argmax()))
            if len(tokens) == max_new_tokens or tokens[-1] in stop_tokens:
                break
            embeds = self._language.embed_tokens(torch.tensor(tokens[-1:], device=device))
            position = torch.full((len(positions), 1), prompt.next_position + len(tokens) - 1, device=device)
            hidden = self._layers(embeds[None], position, range(len(self._language.layers)), cache)
        return FastVAnswer(tokens, kept, phi, torch.stack(logits).cpu().numpy())

    def _prefill(
        self, embeds: Tensor, positions: Tensor, visual: npt.NDArray[np.bool_], num_kept: int, cache: DynamicCache
    ) -> tuple[Tensor, npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The last layer's output [1, kept, hidden], the kept positions [kept] and phi [num_visual]."""
        seen: list[Tensor] = []
        attention = self._language.layers[FULL_LAYERS - 1].self_attn
        hook = attention.register_forward_hook(lambda _module, _inputs, output: seen.append(output[1]))
        try:
            hidden = self._layers(embeds[None], positions, range(FULL_LAYERS), cache, _causal_mask(embeds))
        finally:
            hook.remove()
        phi = seen[0][0, :, -1].float().mean(dim=0).cpu().numpy()[visual]
        keep = ~visual
        keep[np.flatnonzero(visual)[best(phi, num_kept)]] = True
        kept = np.flatnonzero(keep)
        hidden, positions = hidden[:, kept], positions[:, kept]
        rest = range(FULL_LAYERS, len(self._language.layers))
        return self._layers(hidden, positions, rest, cache, _causal_mask(hidden[0])), kept, phi


def check_layers(manifest: Manifest) -> None:
    """Refuse a hybrid model whose layer K-1 has no softmax attention."""
    if manifest.language.is_linear(FULL_LAYERS - 1):
        raise InvalidInput(
            f"selector fastv: layer {FULL_LAYERS - 1} of {manifest.source.name} is linear attention, expected full "
            "attention, by whose weights FastV chooses. Leave fastv out of --selectors"
        )


def fastv_answerer(fastv: FastV, pipe: "Pipeline", metric: Metric, max_new_tokens: int) -> Answerer:
    """Answers with FastV; without times, since another runtime's are not comparable."""
    manifest, chat = pipe.bundle.manifest, pipe.processor.chat
    assert chat is not None  # its prompts are texts
    tokenizer, layers, stop = chat.tokenizer, manifest.language.num_hidden_layers, manifest.special_tokens.eos

    def answer(prepared: PreparedSample, cell: Cell) -> Trial:
        prompt = pipe.processor.layout(prepared.inputs)
        rows = pipe.vision_cache.encode([(prepared.inputs, prompt)])[0].numpy().astype(np.float32)
        num_kept = kept_count(prompt, PruningConfig(keep_ratio=cell.pruning.keep_ratio))
        found = fastv.answer(prompt, rows[prompt.visual_rows[prompt.visual_rows >= 0]], num_kept, max_new_tokens, stop)
        text = tokenizer.decode([token for token in found.token_ids if token not in stop])
        columns = FULL_LAYERS * prompt.num_tokens + (layers - FULL_LAYERS) * len(found.kept)
        return Trial(
            prepared.sample.id,
            *cell.key,
            answer=text,
            score=metric(text, prepared.sample),
            num_visual=prompt.num_visual,
            num_kept=num_kept,
            num_tokens=len(found.token_ids),
            kv_bytes=columns * manifest.kv_bytes_per_token // layers,
            timings=None,
        )

    return answer


def _causal_mask(hidden: Tensor) -> Tensor:
    """Added to attention: 0 up to a token's own place, the lowest number behind it: [1, 1, n, n]."""
    n = len(hidden)
    lowest = torch.finfo(hidden.dtype).min
    return torch.full((n, n), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)[None, None]
