"""Prompts that an export tries, so that a chat template or a setting that cannot be used shows then, not later."""

import numpy as np

from hawk_trt.bundle import Bundle
from hawk_trt.errors import BundleError, CheckpointError, InvalidInput
from hawk_trt.inputs.processor import Processor
from hawk_trt.inputs.tokenizer import read_settings
from hawk_trt.models.family import Family, TokenRun
from hawk_trt.request import Request
from hawk_trt.runtime.generation_config import checkpoint_sampling

_QUESTION = "What is this?"
_ANSWER = "A picture."
_IMAGE_SIDE = 64
# Of generation_config.json: what changes the answers of transformers and is not followed, with what means nothing.
_NOT_FOLLOWED = {
    **{"num_beams": 1, "typical_p": 1, "top_h": None, "penalty_alpha": None, "guidance_scale": None},
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens")),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "forced_eos_token_id", "exponential_decay_length_penalty")),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")),
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look again.",
        "parameters": {"type": "object", "properties": {"where": {"type": "string"}}, "required": ["where"]},
    },
}


def try_prompts(bundle: Bundle, family: Family) -> list[str]:
    """Make a prompt of text, one with an image and, where the template takes them, one with tools.

    bundle: its small files are there.

    Returns:
        What does not work and need not, a sentence each.

    Raises:
        CheckpointError: a file is damaged, or the template refuses text or an image.
    """
    try:
        processor = Processor(bundle, family)
    except (BundleError, InvalidInput) as error:
        raise CheckpointError(str(error)) from error
    if processor.chat is None:
        return ["no tokenizer.json there, so the bundle takes tensors (ModelInputs) alone"]
    template = processor.chat.template
    if template is None:
        return ["no chat template there, so the bundle takes tensors (ModelInputs) alone"]
    image = np.full((_IMAGE_SIDE, _IMAGE_SIDE, 3), 128, np.uint8)
    takes_images = processor.settings["image"] is not None
    notes = [] if takes_images else ["no preprocessor_config.json there, so the bundle takes no image files"]
    try:
        processor(Request(_QUESTION))
        if takes_images:
            processor(Request(_QUESTION, images=[image]))
    except InvalidInput as error:
        raise CheckpointError(f"no prompt can be made of a question and an image: {error}") from error
    if "tools" in template.source:
        try:
            processor(Request(_QUESTION, tools=[_TOOL]))
        except InvalidInput as error:
            notes.append(f"a prompt with tools cannot be made: {error}")
    try:
        checkpoint_sampling(bundle, served=True)
    except BundleError as error:
        reason = str(error).removeprefix(f"{bundle.folder}/")
        notes.append(f"{reason}, or serve with --generation-config none")
    said = read_settings(bundle, "generation_config.json") or {}
    if left := [name for name, nothing in _NOT_FOLLOWED.items() if said.get(name) and said[name] != nothing]:
        notes.append(f"generation_config.json: {', '.join(left)}: not followed here, unlike in transformers")
    return notes + _what_ends_a_turn(processor, bundle.manifest.special_tokens.eos)


def _what_ends_a_turn(processor: Processor, eos: tuple[int, ...]) -> list[str]:
    """A note where the token that the template puts behind an answer is no stop token."""
    assert processor.chat is not None
    turns = [{"role": role, "content": text} for role, text in (("user", _QUESTION), ("assistant", _ANSWER))]
    try:
        parts = processor.chat.encode([*turns, turns[0]])
    except InvalidInput as error:
        return [f"a second question cannot be asked: {error}"]
    at = next((number for number, part in enumerate(parts) if isinstance(part, str) and _ANSWER in part), len(parts))
    after = next((part.token_id for part in parts[at:] if isinstance(part, TokenRun)), None)
    if after in eos:
        return []
    end = "nothing" if after is None else processor.chat.tokenizer.id_to_token(after)
    stops = ", ".join(str(processor.chat.tokenizer.id_to_token(token)) for token in eos) or "none"
    return [
        f"no stop token ends a chat: the chat template ends an answer with {end}, the checkpoint's stop tokens are "
        f"{stops}; answers go on to the longest length. Set eos_token_id in generation_config.json"
    ]
