"""Small random models of transformers and prompts for them, to hold families against."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hawk_trt.request import ModelInputs

VOCAB, IMAGE, VIDEO, VISION_START, VISION_END, EOS, IM_END = 320, 319, 318, 317, 316, 315, 314
TOKEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
IM_END_OPTION = ["--im-end-token-id", str(IM_END)]


def save_random(model: Any, folder: Path, seed: int) -> Path:
    """Give a model random weights, norms near 1 (of Qwen3.5 near 1 + 0), and save it."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = name.endswith(".weight") and ("norm" in name or "ln_q" in name)
            offset = type(model.get_submodule(name.rpartition(".")[0])).__name__ == "Qwen3_5RMSNorm"
            middle = float(is_norm and not offset)
            weight.copy_(middle + 0.15 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return folder


def prompt(
    patch_dim: int,
    images: list[tuple[int, int, int]] = (),
    videos: list[tuple[int, int, int]] = (),
    *,
    seed: int = 0,
    frame_spans: bool = False,
    text: int = 6,
) -> ModelInputs:
    """Text, images and videos, text: 2 x 2 patches a token; frame_spans: each frame apart, text between."""
    rng = np.random.default_rng(seed)

    def words(count: int) -> list[int]:
        return rng.integers(10, 300, count).tolist()

    ids = words(text)
    for token, grids in ((IMAGE, images), (VIDEO, videos)):
        for frames, height, width in grids:
            spans = [frames * height * width // 4]
            if frame_spans and token == VIDEO:
                spans = [height * width // 4] * frames
            for count in spans:
                ids += [*words(2), VISION_START, *[token] * count, VISION_END]
    ids += [*words(text), IM_END, *words(2)]
    return ModelInputs(
        input_ids=np.array(ids, np.int64),
        pixel_values=_pixels(rng, images, patch_dim),
        image_grid_thw=np.array(images, np.int64) if images else None,
        pixel_values_videos=_pixels(rng, videos, patch_dim),
        video_grid_thw=np.array(videos, np.int64) if videos else None,
    )


def released_shapes(config: Any, model_class: Any) -> dict[str, tuple[int, ...]]:
    """Canonical names and shapes of all tensors of transformers' model of a config.json, without making them."""
    import torch

    from export.tensors import qwen_names

    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    tied = ("lm_head.weight",) if config["tie_word_embeddings"] else ()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    return {qwen_names(name)[0]: tuple(tensor.shape) for name, tensor in tensors.items()}


def generate(model: Any, inputs: ModelInputs, steps: int) -> tuple[list[int], npt.NDArray[np.float32]]:
    """What transformers' own generate makes of a prompt: its tokens and the logits they were chosen from."""
    import torch

    ids = torch.from_numpy(inputs.input_ids)[None]
    tensors = {
        name: torch.from_numpy(value)
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
        if (value := getattr(inputs, name)) is not None
    }
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
            **tensors,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits).numpy()


def _pixels(
    rng: np.random.Generator, grids: list[tuple[int, int, int]], patch_dim: int
) -> npt.NDArray[np.float32] | None:
    if not len(grids):
        return None
    return rng.standard_normal((int(np.prod(grids, axis=1).sum()), patch_dim), dtype=np.float32)
