"""Small random checkpoints of the real architecture, and sparse ones of real size, written by hand.

The tensors are those of Qwen2.5-VL; only the sizes differ. safetensors files are written byte by byte, so that
tests can also damage them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
FORMAT_DTYPES = {np.dtype(dtype): name for name, dtype in DTYPES.items()} | {
    np.dtype(np.int8): "I8",
    np.dtype(np.uint8): "U8",
    np.dtype(ml_dtypes.float8_e8m0fnu): "F8_E8M0",
    np.dtype(np.int32): "I32",
    np.dtype(np.int64): "I64",
    np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3",
}
# Prefixes of a canonical name in the hub's files, and in those that transformers 5 saves.
HUB = {"visual.": "visual.", "language_model.": "model."}
NEWER = {"visual.": "model.visual.", "language_model.": "model.language_model."}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of a Qwen2.5-VL model, by Hugging Face's names; the vision tower's begin with vision_."""

    hidden_size: int = 64
    intermediate_size: int = 96
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    vocab_size: int = 320
    vision_hidden_size: int = 32
    vision_intermediate_size: int = 48
    vision_depth: int = 2
    vision_heads: int = 2
    full_attention: tuple[int, ...] = (1,)

    @property
    def head_dim(self) -> int:
        """Size of a language head."""
        return self.hidden_size // self.heads


TINY = Sizes()
QWEN_3B = Sizes(2048, 11008, 36, 16, 2, 151936, 1280, 3420, 32, 16, (7, 15, 23, 31))
QWEN_7B = Sizes(3584, 18944, 28, 28, 4, 152064, 1280, 3420, 32, 16, (7, 15, 23, 31))
QWEN_32B = Sizes(5120, 27648, 64, 40, 8, 152064, 1280, 3456, 32, 16, (7, 15, 23, 31))
QWEN_72B = Sizes(8192, 29568, 80, 64, 8, 152064, 1280, 3456, 32, 16, (7, 15, 23, 31))
# The 3B alone ties its lm_head to its embeddings.
QWEN_MODELS = {"3B": QWEN_3B, "7B": QWEN_7B, "32B": QWEN_32B, "72B": QWEN_72B}


def config(sizes: Sizes = TINY, *, tied: bool = False, nested: bool = False) -> dict[str, Any]:
    """config.json: the text sizes at the top, as on the hub, or nested in text_config, as in newer saves."""
    # Time gets a quarter of the rotary pairs, height and width share the rest: [16, 24, 24] on the 7B.
    pairs = sizes.head_dim // 2
    space = (pairs - pairs // 4) // 2
    mrope_section = [pairs - 2 * space, space, space]
    text: dict[str, Any] = {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "vocab_size": sizes.vocab_size,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 4096,
        "use_sliding_window": False,
    }
    rope = {"mrope_section": mrope_section, "rope_type": "default"}
    if nested:
        text = {"text_config": text | {"rope_parameters": rope | {"rope_theta": 1e6}}}
    else:
        text |= {"rope_scaling": rope, "rope_theta": 1e6}
    top = sizes.vocab_size
    return text | {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": tied,
        "image_token_id": top - 1,
        "video_token_id": top - 2,
        "vision_start_token_id": top - 3,
        "vision_end_token_id": top - 4,
        "eos_token_id": top - 5,
        "vision_config": {
            "depth": sizes.vision_depth,
            "hidden_size": sizes.vision_hidden_size,
            "intermediate_size": sizes.vision_intermediate_size,
            "num_heads": sizes.vision_heads,
            "out_hidden_size": sizes.hidden_size,
            "fullatt_block_indexes": list(sizes.full_attention),
            "hidden_act": "silu",
            "in_channels": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
        },
    }


def shapes(sizes: Sizes = TINY, *, tied: bool = False) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of all tensors."""
    hidden, kv = sizes.hidden_size, sizes.kv_heads * sizes.head_dim
    vision, merged = sizes.vision_hidden_size, 4 * sizes.vision_hidden_size
    found: dict[str, tuple[int, ...]] = {"visual.patch_embed.proj.weight": (vision, 3, 2, 14, 14)}

    def linear(name: str, rows: int, columns: int, bias: bool) -> None:
        found[f"{name}.weight"] = (rows, columns)
        if bias:
            found[f"{name}.bias"] = (rows,)

    for block in (f"visual.blocks.{index}" for index in range(sizes.vision_depth)):
        found |= {f"{block}.norm1.weight": (vision,), f"{block}.norm2.weight": (vision,)}
        linear(f"{block}.attn.qkv", 3 * vision, vision, True)
        linear(f"{block}.attn.proj", vision, vision, True)
        for name in ("gate_proj", "up_proj"):
            linear(f"{block}.mlp.{name}", sizes.vision_intermediate_size, vision, True)
        linear(f"{block}.mlp.down_proj", vision, sizes.vision_intermediate_size, True)
    found["visual.merger.ln_q.weight"] = (vision,)
    linear("visual.merger.mlp.0", merged, merged, True)
    linear("visual.merger.mlp.2", hidden, merged, True)
    found["language_model.embed_tokens.weight"] = (sizes.vocab_size, hidden)
    for layer in (f"language_model.layers.{index}" for index in range(sizes.layers)):
        found |= {f"{layer}.input_layernorm.weight": (hidden,), f"{layer}.post_attention_layernorm.weight": (hidden,)}
        linear(f"{layer}.self_attn.q_proj", hidden, hidden, True)
        linear(f"{layer}.self_attn.k_proj", kv, hidden, True)
        linear(f"{layer}.self_attn.v_proj", kv, hidden, True)
        linear(f"{layer}.self_attn.o_proj", hidden, hidden, False)
        for name in ("gate_proj", "up_proj"):
            linear(f"{layer}.mlp.{name}", sizes.intermediate_size, hidden, False)
        linear(f"{layer}.mlp.down_proj", hidden, sizes.intermediate_size, False)
    found["language_model.norm.weight"] = (hidden,)
    if not tied:
        found["lm_head.weight"] = (sizes.vocab_size, hidden)
    return found


def random_tensors(
    sizes: Sizes = TINY, *, tied: bool = False, dtype: str = "F32", seed: int = 0, scale: float = 0.1
) -> dict[str, npt.NDArray[Any]]:
    """Random weights by canonical name: norms near 1, the rest small."""
    random = np.random.default_rng(seed)
    return {
        name: ((1.0 if "norm" in name else 0.0) + scale * random.standard_normal(shape)).astype(DTYPES[dtype])
        for name, shape in shapes(sizes, tied=tied).items()
    }


def named(name: str, naming: Mapping[str, str]) -> str:
    """A canonical name in a generation of checkpoints."""
    for prefix, written in naming.items():
        if name.startswith(prefix):
            return written + name.removeprefix(prefix)
    return name


def make_checkpoint(
    folder: Path,
    tensors: Mapping[str, npt.NDArray[Any]] | None = None,
    *,
    naming: Mapping[str, str] = HUB,
    shards: int = 1,
    tied: bool = False,
    sizes: Sizes = TINY,
) -> Path:
    """Write a checkpoint folder: config.json, generation_config.json and the tensors, random ones unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(sizes, tied=tied) if tensors is None else tensors
    write_json(folder / "config.json", config(sizes, tied=tied, nested=naming is NEWER))
    write_json(folder / "generation_config.json", {"eos_token_id": [sizes.vocab_size - 5]})
    renamed = {named(name, naming): array for name, array in tensors.items()}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", renamed)
        return folder
    names = list(renamed)
    files = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    for number, file in enumerate(files):
        write_safetensors(folder / file, {name: renamed[name] for name in names[number::shards]})
    _write_index(folder, {name: files[index % shards] for index, name in enumerate(names)})
    return folder


def make_sparse_checkpoint(
    folder: Path, sizes: Sizes = QWEN_7B, *, dtype: str = "BF16", shards: int = 5, tied: bool = False
) -> Path:
    """Write a checkpoint whose tensors are holes in sparse files: real sizes, no disk space."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config(sizes, tied=tied))
    itemsize = np.dtype(DTYPES[dtype]).itemsize
    all_shapes = shapes(sizes, tied=tied)
    total = sum(int(np.prod(shape)) for shape in all_shapes.values()) * itemsize
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    position = 0
    for name, shape in all_shapes.items():
        groups[min(position * shards // total, shards - 1)][named(name, HUB)] = shape
        position += int(np.prod(shape)) * itemsize
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, size_bytes = safetensors_header({name: (dtype, shape, itemsize) for name, shape in group.items()})
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + size_bytes)
        weight_map |= dict.fromkeys(group, file)
    _write_index(folder, weight_map)
    return folder


def write_safetensors(path: Path, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
    """Write a safetensors file."""
    header, _ = safetensors_header(
        {name: (FORMAT_DTYPES[array.dtype], array.shape, array.dtype.itemsize) for name, array in tensors.items()}
    )
    path.write_bytes(header + b"".join(array.tobytes() for array in tensors.values()))


def write_raw_safetensors(path: Path, header: object, data: bytes) -> None:
    """Write a safetensors file of any header, right or wrong."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def write_json(path: Path, content: object) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def safetensors_header(entries: Mapping[str, tuple[str, tuple[int, ...], int]]) -> tuple[bytes, int]:
    """The length and JSON of a header, and the bytes of the data after it."""
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape, itemsize) in entries.items():
        end = position + int(np.prod(shape)) * itemsize
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(described).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, position
