"""The config.json of a checkpoint: a reader that checks each value, the language side, the special tokens.

Three generations of the file are read: the hub's (text sizes at the top level, rope_scaling), transformers 4.52's (at
the top level and in text_config) and 5's (text_config with rope_parameters). text_config wins where it holds a key.
What the graphs cannot compute is refused here, by the name of its key.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from hawk_trt.bundle import SpecialTokens
from hawk_trt.errors import CheckpointError
from hawk_trt.models.vision_config import AnyVision
from hawk_trt.stages import LanguageConfig

# Beyond these no model is, and a size that a checkpoint makes up would fill the memory before a tensor is missed.
_MOST = 2**30
# Of layers, and of the sides of patches and of blocks of them.
_MOST_SMALL = 1000
_SMALL = ("num_hidden_layers", "depth", "patch_size", "temporal_patch_size", "spatial_merge_size")
# A number is used as float32.
_SMALLEST, _LARGEST = 1e-30, 1e30
# Share of a hybrid model's heads that is rotated, where config.json does not say.
_ROTARY_FACTOR = 0.25
# Characters of a value in an error.
_SHOWN = 200
_ROPE = {"rope_scaling", "rope_parameters", "rope_theta"}
_IM_TOKENS = {"im_start": "<|im_start|>", "im_end": "<|im_end|>"}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a checkpoint's config.json says, checked.

    chat_template: the Jinja of a checkpoint whose own files hold none that knows images; None where they do.
    """

    language: LanguageConfig
    vision: AnyVision
    special_tokens: SpecialTokens
    chat_template: str | None = None


class Section:
    """A section of config.json, whose content is `values`; what cannot be used is refused with a CheckpointError."""

    def __init__(self, values: object, name: str = "", file: str = "config.json") -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(f"{file}: {name}: got {repr(values)[:_SHOWN]}, expected a JSON object")
        self.values: Mapping[str, Any] = values
        self.name, self._where = name, f"{file}: {name}." if name else f"{file}: "

    def get(self, key: str, default: object = None) -> Any:  # noqa: ANN401 - JSON
        """The unchecked value under a key."""
        return self.values.get(key, default)

    def integer(self, key: str) -> int:
        """The integer of at least 1 under a key, and of a size that models have."""
        value = self.get(key)
        most = _MOST_SMALL if key in _SMALL else _MOST
        if not is_integer(value) or not 1 <= value <= most:
            raise self.wrong(key, f"an integer of 1 to {most}")
        return value

    def number(self, key: str) -> float:
        """The number above 0 under a key."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _SMALLEST < value < _LARGEST:
            raise self.wrong(key, f"a number above 0 in float32 and below {_LARGEST:g}")
        return float(value)

    def expect(self, key: str, expected: object, unsaid: object = None) -> None:
        """Refuse every value but one. unsaid: what a missing key means."""
        if self.get(key, unsaid) != expected:
            raise self.wrong(key, str(expected))

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error of a value that is missing or cannot be used."""
        got = self.get(key)
        shown = "nothing" if got is None else repr(got)[:_SHOWN]
        return CheckpointError(f"{self._where}{key}: got {shown}, expected {expected}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def vision_section(config: Mapping[str, Any], defaults: Mapping[str, object] | None = None) -> Section:
    """The vision_config of config.json. defaults: of the keys that it leaves out."""
    vision = config.get("vision_config")
    if not isinstance(vision, Mapping):
        raise Section(config).wrong("vision_config", "the sizes of the vision tower")
    return Section({**(defaults or {}), **vision}, "vision_config")


def text_section(config: Mapping[str, Any]) -> Section:
    """The top level of config.json, overridden by what text_config sets; rotary embeddings are of one place alone."""
    text = Section(config.get("text_config") or {}, "text_config").values
    given = {key: value for key, value in text.items() if value is not None}
    above = {key: value for key, value in config.items() if not (key in _ROPE and given.keys() & _ROPE)}
    return Section({**above, **given})


def language_config(
    config: Mapping[str, Any], *, mrope: bool = True, qk_norm: bool = False, hybrid: bool = False
) -> LanguageConfig:
    """Sizes of the language model from config.json.

    mrope: whether positions have time, height and width; else plain 1-D ones.  qk_norm: whether it is Qwen3's, with
    queries and keys normed per head, no biases, and head_dim in config.json; else it is Qwen2's, whose head_dim is
    hidden_size / num_attention_heads.  hybrid: whether it may have linear layers, and rotate a part of each head.
    """
    text = text_section(config)
    if not hybrid:
        _refuse_sliding_window(text)
    text.expect("hidden_act", "silu", "silu")
    if qk_norm:
        text.expect("attention_bias", False, False)
    hidden_size = text.integer("hidden_size")
    heads, kv_heads = text.integer("num_attention_heads"), text.integer("num_key_value_heads")
    if hidden_size % heads and not qk_norm:
        raise text.wrong("num_attention_heads", f"a divisor of hidden_size {hidden_size}")
    if heads % kv_heads:
        raise text.wrong("num_key_value_heads", f"a divisor of num_attention_heads {heads}")
    head_dim = text.integer("head_dim") if qk_norm else hidden_size // heads
    if text.get("head_dim") not in (None, head_dim):
        raise text.wrong("head_dim", f"hidden_size / num_attention_heads = {head_dim}")
    rotary_dim = _rotary_dim(text, head_dim) if hybrid else head_dim
    rope_theta, mrope_section = _rope(text, rotary_dim, mrope=mrope)
    return LanguageConfig(
        hidden_size=hidden_size,
        intermediate_size=text.integer("intermediate_size"),
        num_hidden_layers=text.integer("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=text.integer("vocab_size"),
        rms_norm_eps=text.number("rms_norm_eps"),
        rope_theta=rope_theta,
        mrope_section=mrope_section,
        max_position_embeddings=text.integer("max_position_embeddings"),
        # Either place counts: 4.x wrote it at the top or in text_config, 5 at the top.
        tie_word_embeddings=bool(config.get("tie_word_embeddings")) or bool(text.get("tie_word_embeddings")),
        qk_norm=qk_norm,
        rotary_dim=rotary_dim if rotary_dim < head_dim else 0,
    )


def special_tokens(
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    added_tokens: Mapping[str, int],
    spellings: Mapping[str, str],
) -> SpecialTokens:
    """Ids of the tokens that the runtime must know, None or empty where the checkpoint names none.

    generation, added_tokens: see architectures.read_config; empty where there is none.  spellings: of the tokens of
    images and videos, by their fields in SpecialTokens.
    """
    text = Section(config.get("text_config") or {}, "text_config").values
    vocab_size = text_section(config).integer("vocab_size")

    def checked(key: str, token: object, source: Mapping[str, Any]) -> int:
        if not is_integer(token) or not 0 <= token < vocab_size:
            file = {id(generation): "generation_config.json", id(added_tokens): "tokenizer.json"}.get(id(source))
            raise Section({key: token}, file=file or "config.json").wrong(
                key, f"a token id below vocab_size {vocab_size}"
            )
        return token

    def first(key: str, spelling: str, *sources: Mapping[str, Any]) -> int | None:
        source = next((source for source in sources if source.get(key) is not None), added_tokens)
        token = added_tokens.get(spelling) if source is added_tokens else source[key]
        return None if token is None else checked(key, token, source)

    spelt = {**spellings, **_IM_TOKENS}
    named = {name: first(f"{name}_token_id", spelling, config, text) for name, spelling in spelt.items()}
    pads = (source.get("pad_token_id") for source in (generation, config, text))  # -1 and the like are none
    known = (token for token in (*pads, added_tokens.get("<|endoftext|>")) if is_integer(token))
    pad = next((token for token in known if 0 <= token < vocab_size), None)
    ends = []
    for source in (generation, config, text):
        value = source.get("eos_token_id")
        listed = value if isinstance(value, list) else [] if value is None else [value]
        ends += [checked("eos_token_id", token, source) for token in listed]
    return SpecialTokens(**named, pad=pad, eos=tuple(dict.fromkeys(ends)))


def rope_section(text: Section) -> Section:
    """The section of rotary embeddings: rope_scaling, which counts where both are there, or 5.x's rope_parameters."""
    key = "rope_scaling" if text.get("rope_scaling") else "rope_parameters"
    return Section(text.get(key) or {}, key)


def _rotary_dim(text: Section, head_dim: int) -> int:
    """Numbers of a head that are rotated; partial_rotary_factor says which share, in either of two places."""
    rope = rope_section(text)
    place = rope if "partial_rotary_factor" in rope.values else text
    factor = place.number("partial_rotary_factor") if "partial_rotary_factor" in place.values else _ROTARY_FACTOR
    rotary_dim = int(head_dim * factor)
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise place.wrong("partial_rotary_factor", f"a share of head_dim {head_dim} that is an even number")
    return rotary_dim


def _rope(text: Section, rotary_dim: int, *, mrope: bool) -> tuple[float, tuple[int, ...]]:
    """rope_theta and mrope_section; see rope_section.

    Dynamic scaling of 1-D positions begins beyond max_position_embeddings, where no prompt gets.
    """
    rope = rope_section(text)
    known = "mrope" if mrope else "dynamic"
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", known):
        advice = f"default or {known} (remove the scaling to use the trained context)"
        raise Section({"rope_type": rope_type}, rope.name).wrong("rope_type", advice)
    theta = (rope if "rope_theta" in rope.values else text).number("rope_theta")
    if not mrope:
        return theta, ()
    section = rope.get("mrope_section")
    shares = isinstance(section, list | tuple) and all(is_integer(share) and share >= 0 for share in section)
    if not shares or len(section) != 3 or 2 * sum(section) != rotary_dim:
        expected = f"three numbers of frequencies that add up to head_dim / 2 = {rotary_dim / 2:g}"
        raise rope.wrong("mrope_section", expected)
    return theta, tuple(section)


def _refuse_sliding_window(text: Section) -> None:
    layers = text.get("layer_types")
    if layers is None:
        # Before layer_types, the window applied from layer max_window_layers on.
        first = text.get("max_window_layers", 0)
        slides = text.get("use_sliding_window") and text.get("sliding_window") is not None
        if slides and first < text.integer("num_hidden_layers"):
            raise text.wrong("use_sliding_window", f"false (it would apply from layer {first} on)")
    elif other := sorted({str(layer) for layer in layers} - {"full_attention"}):
        raise Section({"layer_types": ", ".join(other)}).wrong("layer_types", "full_attention in every layer")
