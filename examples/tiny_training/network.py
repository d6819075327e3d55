"""The forward pass of training: the weights of transformers' Qwen2.5-VL, for pictures of one size and packed questions.

It computes what transformers' own forward does (a test holds them together), faster on a CPU: windows and questions
are dimensions of a tensor here, not a loop or a mask, and all but the weights and their updates is bfloat16. A weight
is cast where it is used, so that its gradient is float32 again.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.tiny_training.lessons import NO_LABEL, PackedQuestions, Patches

_WINDOW = 4  # tokens along the side of a window, 112 pixels
_PER_TOKEN = 4  # patches that become one token
_ROPE_BASE = 10000.0


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight, with no float32 copy of x on the way back."""

    @staticmethod
    def forward(context: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:  # noqa: ANN401 - torch's own
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.shape[-1] + epsilon).rsqrt().to(x.dtype)
        normed = x * scale
        context.save_for_backward(normed, scale, weight)
        scaled: Tensor = normed * weight
        return scaled

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401 - torch's own
        normed, scale, weight = context.saved_tensors
        (gradient,) = gradients
        product = (gradient * normed).flatten(0, -2)
        of_weight = (product.new_ones(1, len(product)) @ product)[0]
        mean = (product @ (weight[:, None] / len(weight))).view_as(scale)
        return torch.addcmul(gradient * weight, normed, mean, value=-1).mul_(scale), of_weight, None


def normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """X at unit mean square along its last dimension, times the weight."""
    out: Tensor = _RmsNorm.apply(x, weight, epsilon)
    return out


class Network:
    """Runs a model's weights.

    Attributes:
        dtype: of all that is computed but logits.
        hidden: length of a token's vector.
    """

    def __init__(self, model: Any, dtype: torch.dtype = torch.bfloat16) -> None:  # noqa: ANN401 - has no useful type
        self._tower = model.model.visual
        self._language = model.model.language_model
        self.dtype = dtype
        self.hidden: int = self._language.config.hidden_size

    def visual_tokens(self, patches: Patches) -> Tensor:
        """What the vision tower makes of square pictures of one size: [pictures, num_visual, hidden], row by row."""
        count, side = len(patches.grid_thw), int(patches.grid_thw[0, 1]) // 2
        windows = side // _WINDOW
        # token row, token column -> window row, window column, the token's row and column in it, its patches
        split = (count, windows, _WINDOW, windows, _WINDOW, _PER_TOKEN, -1)
        x = patches.pixel_values.to(self.dtype).view(split).transpose(2, 3).flatten(1, 5)
        tower = self._tower
        x = functional.linear(x, self._half(tower.patch_embed.proj.weight).flatten(1))
        cos, sin = self._patch_angles(side)
        for number, block in enumerate(tower.blocks):
            y = self._norm(block.norm1, x)
            qkv = self._linear(block.attn.qkv, y).unflatten(-1, (3, block.attn.num_heads, -1))
            turned = rotate(qkv[:, :, :2], cos[:, None, None], sin[:, None, None])
            parts = [*turned.unbind(2), qkv[:, :, 2]]
            whole = number in tower.fullatt_block_indexes
            if not whole:
                parts = [part.unflatten(1, (windows * windows, -1)) for part in parts]
            query, key, value = (part.transpose(-2, -3) for part in parts)
            weights = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(-1)
            out = (weights @ value).transpose(-2, -3).flatten(-2)
            x = x + self._linear(block.attn.proj, out if whole else out.flatten(1, 2))
            x = x + self._gated(block.mlp, self._norm(block.norm2, x))
        merger = tower.merger
        x = self._norm(merger.ln_q, x).unflatten(1, (-1, _PER_TOKEN)).flatten(2)
        x = self._linear(merger.mlp[2], functional.gelu(self._linear(merger.mlp[0], x)))
        return x.view(count, windows, windows, _WINDOW, _WINDOW, -1).transpose(2, 3).flatten(1, 4)

    def answer_logits(self, visual: Tensor, packed: PackedQuestions) -> tuple[Tensor, Tensor]:
        """Logits at every token before one of an answer.

        Args:
            visual: [pictures, num_visual, hidden], of square pictures.
            packed: the questions about them.

        Returns:
            Logits float32 [num_labels, vocab], and where labels are: bool [pictures, questions, segment].
        """
        count, num_visual, _ = visual.shape
        questions, segment = packed.input_ids.shape[1:]
        shared = len(packed.before) + num_visual
        table = self._half(self._language.embed_tokens.weight)
        before = functional.embedding(packed.before, table).expand(count, -1, -1)
        x = torch.cat([before, visual.to(self.dtype), functional.embedding(packed.input_ids.flatten(1), table)], dim=1)
        cos, sin = self._token_angles(len(packed.before), num_visual, questions, segment)
        bias = torch.zeros(count, shared, dtype=self.dtype)
        bias[:, len(packed.before) :].masked_fill_(~packed.seen, float("-inf"))
        for layer in self._language.layers:
            attention = layer.self_attn
            y = self._norm(layer.input_layernorm, x)
            query, key, value = (
                self._linear(part, y).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            out = packed_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, bias, segment)
            x = x + self._linear(attention.o_proj, out)
            x = x + self._gated(layer.mlp, self._norm(layer.post_attention_layernorm, x))
        wanted = packed.labels != NO_LABEL
        asked = x[:, shared:].unflatten(1, (questions, segment))[wanted]
        return functional.linear(self._norm(self._language.norm, asked), table).float(), wanted

    def _half(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)

    def _linear(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(x, self._half(layer.weight), None if layer.bias is None else self._half(layer.bias))

    def _norm(self, layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - transformers' RMSNorm
        return normed(x, self._half(layer.weight), layer.variance_epsilon)

    def _gated(self, mlp: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - transformers' MLP
        return self._linear(
            mlp.down_proj, functional.silu(self._linear(mlp.gate_proj, x)) * self._linear(mlp.up_proj, x)
        )

    def _patch_angles(self, side: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [num_patches, head_dim / 2] of the patches, window after window."""
        windows = side // _WINDOW
        axis = torch.arange(windows), torch.arange(_WINDOW), torch.arange(2)
        grid = torch.cartesian_prod(axis[0], axis[0], axis[1], axis[1], axis[2], axis[2])
        rows = (grid[:, 0] * _WINDOW + grid[:, 2]) * 2 + grid[:, 4]
        columns = (grid[:, 1] * _WINDOW + grid[:, 3]) * 2 + grid[:, 5]
        pairs = self._tower.config.hidden_size // self._tower.config.num_heads // 2
        frequencies = _ROPE_BASE ** -(torch.arange(0, pairs, 2) / pairs)
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _token_angles(self, num_before: int, num_visual: int, questions: int, segment: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [row, head_dim / 2] of mRoPE."""
        positions = self._token_positions(num_before, num_visual, questions, segment)
        rope = self._language.config.rope_parameters
        pairs = self._language.layers[0].self_attn.head_dim // 2
        frequencies = rope["rope_theta"] ** -(torch.arange(pairs) / pairs)
        axis = torch.arange(3).repeat_interleave(torch.tensor(rope["mrope_section"]))
        angles = positions[axis].T * frequencies
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _token_positions(self, num_before: int, num_visual: int, questions: int, segment: int) -> Tensor:
        """Time, row and column [3, row], each question as if it were the only one."""
        side = round(num_visual**0.5)
        before = torch.arange(num_before).expand(3, -1)
        rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        visual = num_before + torch.stack([torch.zeros_like(rows), rows, columns])
        behind = (num_before + side + torch.arange(segment)).repeat(questions).expand(3, -1)
        return torch.cat([before, visual, behind], dim=1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + half) of the last dimension."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def packed_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, segment: int) -> Tensor:
    """Causal attention within what all questions see, and of each question to that and to itself.

    Args:
        query: [batch, heads, row, head_dim].
        key: [batch, kv_heads, row, head_dim].
        value: of that shape.
        bias: [batch, shared], 0 for the tokens at the start of a row that are seen, else minus infinity.
        segment: tokens of a question.

    Returns:
        [batch, row, heads * head_dim].
    """
    groups, row, shared = query.shape[1] // key.shape[1], query.shape[2], bias.shape[1]
    bias = bias[:, None, None, None]
    query = (query * query.shape[-1] ** -0.5).unflatten(1, (-1, groups))
    first, rest = query[:, :, :, :shared], query[:, :, :, shared:]
    key_shared, value_shared = key[:, :, :shared].transpose(-1, -2), value[:, :, :shared]

    scores = (first.flatten(2, 3) @ key_shared).unflatten(2, (groups, shared)) + (causal(shared, query.dtype) + bias)
    out_shared = (scores.softmax(-1).flatten(2, 3) @ value_shared).unflatten(2, (groups, shared))

    questions = (row - shared) // segment
    own_key, own_value = (
        part[:, :, shared:].unflatten(2, (questions, segment)).unsqueeze(2).expand(-1, -1, groups, -1, -1, -1)
        for part in (key, value)
    )
    to_shared = (rest.flatten(2, 3) @ key_shared).unflatten(2, (groups, questions, segment)) + bias[:, :, :, None]
    to_own = rest.unflatten(3, (questions, segment)) @ own_key.transpose(-1, -2) + causal(segment, query.dtype)
    weights = torch.cat([to_shared, to_own], dim=-1).softmax(-1)
    on_shared, on_own = weights.split([shared, segment], dim=-1)
    out = (on_shared.flatten(2, 4) @ value_shared).unflatten(2, (groups, row - shared))
    out = out + (on_own @ own_value).flatten(3, 4)
    return torch.cat([out_shared, out], dim=3).flatten(1, 2).transpose(1, 2).flatten(2)


def causal(length: int, dtype: torch.dtype) -> Tensor:
    """0 where a token sees another, else minus infinity: [length, length]."""
    return torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
