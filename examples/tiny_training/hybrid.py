"""The forward pass of training for a hybrid, the weights of transformers' Qwen3.5: gated delta nets, softmax attention.

As in network.py, pictures are of one size, and the questions packed behind a picture do not see one another: each
begins with the state and last tokens that the picture left. What is hidden is dropped where pruning drops it, before
the first layer of softmax attention. The linear layers before it see every token. From there on the hidden tokens
stand at the start of the row, where they are nothing: zeros for a linear layer, masked for a softmax layer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from examples.tiny_training.lessons import NO_LABEL, PackedQuestions, Patches
from examples.tiny_training.network import Network, causal, normed, packed_attention, rotate

_PATCHES_PER_TOKEN = 4
_EPSILON = 1e-6  # of layer norms and of the lengths of queries and keys
_NOT_SEEN = -1e4  # instead of minus infinity: a hidden token that sees nothing still gets numbers


class _Convolution(torch.autograd.Function):
    """Each channel's weighted sum over a token and those just before it: [..., before + tokens, channels]."""

    @staticmethod
    def forward(context: Any, x: Tensor, kernel: Tensor) -> Tensor:  # noqa: ANN401 - torch's own
        context.save_for_backward(x, kernel)
        tokens = x.shape[-2] - len(kernel) + 1
        out = x[..., :tokens, :] * kernel[0]
        for number in range(1, len(kernel)):
            out.addcmul_(x[..., number : number + tokens, :], kernel[number])
        return out

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - torch's own
        x, kernel = context.saved_tensors
        (gradient,) = gradients
        tokens = gradient.shape[-2]
        of_x, of_kernel = torch.zeros_like(x), []
        for number, weight in enumerate(kernel):
            seen = slice(number, number + tokens)
            of_x[..., seen, :].addcmul_(gradient, weight)
            product = (gradient * x[..., seen, :]).flatten(0, -2)
            of_kernel.append((product.new_ones(1, len(product)) @ product)[0])
        return of_x, torch.stack(of_kernel)


class HybridNetwork(Network):
    """Runs a hybrid's weights."""

    @property
    def first_full(self) -> int:
        """The first layer of softmax attention, which tokens are chosen at."""
        place: int = self._language.config.layer_types.index("full_attention")
        return place

    def visual_tokens(self, patches: Patches) -> Tensor:
        """What the vision tower makes of square pictures of one size: [pictures, num_visual, hidden], row by row."""
        tower = self._tower
        count, side = len(patches.grid_thw), int(patches.grid_thw[0, 1])
        x = patches.pixel_values.to(self.dtype).view(count, side * side, -1)
        projection = tower.patch_embed.proj
        x = functional.linear(x, self._half(projection.weight).flatten(1), self._half(projection.bias))
        rows, columns = _patch_places(side)
        x = x + self._half(self._place_embeddings(rows, columns, side))
        cos, sin = self._patch_turns(rows, columns)
        for block in tower.blocks:
            qkv = self._linear(block.attn.qkv, self._layer_norm(block.norm1, x))
            query, key, value = qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
            out = functional.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
            x = x + self._linear(block.attn.proj, out.transpose(1, 2).flatten(2))
            y = self._linear(block.mlp.linear_fc1, self._layer_norm(block.norm2, x))
            x = x + self._linear(block.mlp.linear_fc2, functional.gelu(y, approximate="tanh"))
        merger = tower.merger
        x = self._layer_norm(merger.norm, x).unflatten(1, (-1, _PATCHES_PER_TOKEN)).flatten(2)
        return self._linear(merger.linear_fc2, functional.gelu(self._linear(merger.linear_fc1, x)))

    def answer_logits(
        self, visual: Tensor, packed: PackedQuestions, hide_at: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits at every token before one of an answer.

        Args:
            visual: [pictures, num_visual, hidden], of square pictures.
            packed: the questions about them.
            hide_at: the first layer that does not see what is hidden; None for the first of softmax attention.

        Returns:
            Logits float32 [num_labels, vocab], and where labels are: bool [pictures, questions, segment].
        """
        row = self._row(visual, packed)
        for number, layer in enumerate(self._language.layers):
            if number == (self.first_full if hide_at is None else hide_at):
                row.hide(packed.seen)
            self._layer(layer, row)
        wanted = packed.labels != NO_LABEL
        asked = row.x[:, row.shared :].unflatten(1, packed.labels.shape[1:])[wanted]
        table = self._half(self._language.embed_tokens.weight)
        return functional.linear(self._norm(self._language.norm, asked), table).float(), wanted

    def token_scores(
        self, visual: Tensor, packed: PackedQuestions, *, of_embeddings: bool = False, by_last: bool = False
    ) -> Tensor:
        """HAWK's scores of the visual tokens by each picture's first question, all heads alike: [pictures, num_visual].

        Queries and keys are those of the first layer of softmax attention, of what this layer takes or, as if it were
        layer 0, of the embeddings. The query is the mean over the question's tokens; by_last, the prompt's last token.
        """
        row = self._row(visual, packed)
        layers = self._language.layers[: self.first_full + 1]
        if not of_embeddings:
            for layer in layers[:-1]:
                self._layer(layer, row)
        attention, before = layers[-1].self_attn, len(packed.before)
        y = self._norm(layers[-1].input_layernorm, row.x)
        ids = packed.input_ids[:, 0]
        asking = (ids == self._language.config.eos_token_id).cumsum(1) == 0
        asking[:, 0] = False  # the end of the picture
        if by_last:
            asking = functional.one_hot((packed.labels[:, 0] != NO_LABEL).long().argmax(1), row.segment).bool()
        query, _ = (
            self._linear(attention.q_proj, y[:, row.shared : row.shared + row.segment])
            .unflatten(-1, (-1, 2 * attention.head_dim))
            .chunk(2, dim=-1)
        )
        mean = (self._norm(attention.q_norm, query) * asking[..., None, None]).sum(1) / asking.sum(1)[:, None, None]
        key = self._linear(attention.k_proj, y[:, before : row.shared]).unflatten(-1, (-1, attention.head_dim))
        key = self._norm(attention.k_norm, key).repeat_interleave(attention.num_key_value_groups, dim=2)
        by_head = torch.einsum("phd,pnhd->phn", mean, key)
        return functional.normalize(by_head, dim=-1).mean(1)

    def _row(self, visual: Tensor, packed: PackedQuestions) -> "_Row":
        count, num_visual, _ = visual.shape
        questions, segment = packed.input_ids.shape[1:]
        shared = len(packed.before) + num_visual
        table = self._half(self._language.embed_tokens.weight)
        before = functional.embedding(packed.before, table).expand(count, -1, -1)
        x = torch.cat([before, visual.to(self.dtype), functional.embedding(packed.input_ids.flatten(1), table)], dim=1)
        cos, sin = self._token_turns(len(packed.before), num_visual, questions, segment)
        return _Row(x, cos[None], sin[None], shared, segment)

    def _layer(self, layer: Any, row: "_Row") -> None:  # noqa: ANN401 - transformers' layer
        y = self._norm(layer.input_layernorm, row.x)
        if layer.block_type == "linear_attention":
            mixed = self._delta_net(layer.linear_attn, y, row)
        else:
            mixed = self._attention(layer.self_attn, y, row)
        x = row.x + mixed
        row.x = x + self._gated(layer.mlp, self._norm(layer.post_attention_layernorm, x))

    def _attention(self, attention: Any, y: Tensor, row: "_Row") -> Tensor:  # noqa: ANN401 - transformers' attention
        query, gate = self._linear(attention.q_proj, y).unflatten(-1, (-1, 2 * attention.head_dim)).chunk(2, dim=-1)
        key, value = (
            self._linear(part, y).unflatten(-1, (-1, attention.head_dim))
            for part in (attention.k_proj, attention.v_proj)
        )
        query, key = self._norm(attention.q_norm, query), self._norm(attention.k_norm, key)
        cos, sin = row.cos[:, None], row.sin[:, None]
        query, key = (_rotate_part(part.transpose(1, 2), cos, sin) for part in (query, key))
        bias = torch.zeros(len(y), row.shared, dtype=self.dtype)
        if row.seen is not None:
            bias.masked_fill_(~row.seen, _NOT_SEEN)
        out = packed_attention(query, key, value.transpose(1, 2), bias, row.segment)
        return self._linear(attention.o_proj, out * gate.flatten(2).sigmoid())

    def _delta_net(self, net: Any, y: Tensor, row: "_Row") -> Tensor:  # noqa: ANN401 - transformers' gated delta net
        if row.seen is not None:
            y = torch.cat([y[:, : row.shared] * row.seen[..., None], y[:, row.shared :]], dim=1)
        mixed, gate = self._linear(net.in_proj_qkv, y), self._linear(net.in_proj_z, y)
        strength = self._linear(net.in_proj_b, y).float().sigmoid()
        decay = -net.A_log.exp() * functional.softplus(self._linear(net.in_proj_a, y).float() + net.dt_bias)
        kernel = self._half(net.conv1d.weight)[:, 0].T
        shared, own = mixed[:, : row.shared], mixed[:, row.shared :].unflatten(1, (-1, row.segment))
        ahead = len(kernel) - 1
        tail = shared[:, None, -ahead:].expand(-1, own.shape[1], -1, -1)
        state = None
        outs = []
        for part, before, strengths, decays in (
            (shared, torch.zeros_like(shared[:, :ahead]), strength[:, : row.shared], decay[:, : row.shared]),
            (
                own,
                tail,
                strength[:, row.shared :].unflatten(1, (-1, row.segment)),
                decay[:, row.shared :].unflatten(1, (-1, row.segment)),
            ),
        ):
            convolved = functional.silu(_Convolution.apply(torch.cat([before, part], dim=-2), kernel))
            query, key, value = (
                of_all.unflatten(-1, (-1, size)).transpose(-2, -3).float()
                for of_all, size in zip(
                    convolved.split([net.key_dim, net.key_dim, net.value_dim], dim=-1),
                    (net.head_k_dim, net.head_k_dim, net.head_v_dim),
                    strict=True,
                )
            )
            groups = net.num_v_heads // net.num_k_heads
            query, key = (_unit(part).repeat_interleave(groups, dim=-3) for part in (query, key))
            out, state = delta_rule(
                query * net.head_k_dim**-0.5,
                key,
                value,
                decays.transpose(-1, -2),
                strengths.transpose(-1, -2),
                None if state is None else state[:, None],
            )
            outs.append(out.transpose(-2, -3).to(self.dtype))
        out = torch.cat([outs[0], outs[1].flatten(1, 2)], dim=1)
        out = normed(out, self._half(net.norm.weight), net.norm.variance_epsilon)
        out = out * functional.silu(gate.unflatten(-1, (-1, net.head_v_dim)))
        return self._linear(net.out_proj, out.flatten(2))

    def _norm(self, layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401 - transformers' RMSNorm
        return normed(x, self._half(1 + layer.weight), layer.eps)

    def _layer_norm(self, layer: nn.LayerNorm, x: Tensor) -> Tensor:
        return functional.layer_norm(x, x.shape[-1:], self._half(layer.weight), self._half(layer.bias), _EPSILON)

    def _place_embeddings(self, rows: Tensor, columns: Tensor, side: int) -> Tensor:
        """The learnt square of embeddings, stretched to the picture's patches: [num_patches, width]."""
        own = self._tower.num_grid_per_side
        taps = []
        for at in (rows, columns):
            place = at * ((own - 1) / max(side - 1, 1))
            low = place.floor().long().clamp(max=own - 1)
            share = (place - low)[:, None]
            taps.append(((low, 1 - share), ((low + 1).clamp(max=own - 1), share)))
        found = [
            functional.embedding(row * own + column, self._tower.pos_embed.weight) * (down * across)
            for row, down in taps[0]
            for column, across in taps[1]
        ]
        return torch.stack(found).sum(0)

    def _patch_turns(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [num_patches, head_dim / 2]."""
        config = self._tower.config
        pairs = config.hidden_size // config.num_heads // 2
        frequencies = config.rope_parameters["rope_theta"] ** -(torch.arange(0, pairs, 2) / pairs)
        angles = torch.cat([rows[:, None] * frequencies, columns[:, None] * frequencies], dim=1)
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)

    def _token_turns(self, num_before: int, num_visual: int, questions: int, segment: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [row, pairs] of interleaved mRoPE on the part of a head that is turned."""
        positions = self._token_positions(num_before, num_visual, questions, segment)
        config = self._language.config
        rope = config.rope_parameters
        pairs = int(config.head_dim * rope["partial_rotary_factor"]) // 2
        frequencies = rope["rope_theta"] ** -(torch.arange(pairs) / pairs)
        axis = torch.zeros(pairs, dtype=torch.long)
        for number, offset in ((1, 1), (2, 2)):
            axis[offset : 3 * rope["mrope_section"][number] : 3] = number
        angles = positions[axis].T * frequencies
        return angles.cos().to(self.dtype), angles.sin().to(self.dtype)


@dataclass(slots=True)
class _Row:
    """Pictures with their questions on the way through the layers.

    Attributes:
        x: [pictures, row, hidden].
        cos: [1 or pictures, row, pairs].
        sin: of that shape.
        shared: tokens at the start that all questions see.
        segment: tokens of a question.
        seen: bool [pictures, shared], None for all.
    """

    x: Tensor
    cos: Tensor
    sin: Tensor
    shared: int
    segment: int
    seen: Tensor | None = None

    def hide(self, visual_seen: Tensor) -> None:
        """Move the visual tokens that are not seen to the start of the row; the others keep their order and angles."""
        if visual_seen.all():
            return
        ahead = self.shared - visual_seen.shape[1]
        seen = functional.pad(visual_seen, (ahead, 0), value=True)
        rest = torch.arange(self.shared, self.x.shape[1]).expand(len(seen), -1)
        order = torch.cat([seen.long().argsort(dim=1, stable=True), rest], dim=1)[..., None]
        self.seen = seen.gather(1, order[:, : self.shared, 0])
        self.x = self.x.gather(1, order.expand_as(self.x))
        self.cos, self.sin = (
            of_all.expand(len(seen), -1, -1).gather(1, order.expand(-1, -1, of_all.shape[-1]))
            for of_all in (self.cos, self.sin)
        )


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, strength: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule over a short run of tokens at once: S <- exp(g) S, S <- S + b k (v - S^T k)^T, out = S^T q.

    What each token adds depends on what those before it added, which is a triangular system of equations.

    Args:
        query: float32 [..., tokens, key width].
        key: of that shape.
        value: [..., tokens, value width].
        decay: [..., tokens], logarithms, at most 0.
        strength: [..., tokens], from 0 to 1.
        state: [..., key width, value width], None for zeros.

    Returns:
        [..., tokens, value width] and the state after the last token.
    """
    total = decay.cumsum(-1)
    between = (total[..., :, None] - total[..., None, :] + causal(total.shape[-1], total.dtype)).exp()
    by_strength = key * strength[..., None]
    system = (by_strength @ key.transpose(-1, -2)) * between
    wanted = value * strength[..., None]
    so_far = total.exp()[..., None]
    if state is not None:
        wanted = wanted - (by_strength * so_far) @ state
    added = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    out = ((query @ key.transpose(-1, -2)) * between) @ added
    left = (key * (total[..., -1:] - total).exp()[..., None]).transpose(-1, -2) @ added
    if state is not None:
        out = out + (query * so_far) @ state
        left = left + state * so_far[..., -1:, :]
    return out, left


def _unit(x: Tensor) -> Tensor:
    return x * (x.square().sum(-1, keepdim=True) + _EPSILON).rsqrt()


def _rotate_part(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first dimensions of a head; the rest stay."""
    turned = 2 * cos.shape[-1]
    return torch.cat([rotate(x[..., :turned], cos, sin), x[..., turned:]], dim=-1)


def _patch_places(side: int) -> tuple[Tensor, Tensor]:
    """Row and column of each patch, token after token."""
    tokens, two = torch.arange(side // 2), torch.arange(2)
    grid = torch.cartesian_prod(tokens, tokens, two, two)
    return grid[:, 0] * 2 + grid[:, 2], grid[:, 1] * 2 + grid[:, 3]
