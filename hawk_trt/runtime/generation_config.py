"""How a checkpoint's generation_config.json says that tokens are drawn."""

import msgspec

from hawk_trt.bundle import Bundle
from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.files import parse_json
from hawk_trt.request import SamplingConfig

_GENERATION_CONFIG = "generation_config.json"
SMALLEST_TOP_P = 1e-9  # for 0, which others allow: the most probable token as well
_TOP_K = 50  # of transformers, where the file samples and does not say


class _Said(msgspec.Struct):
    """What generation_config.json says of sampling."""

    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def checkpoint_sampling(bundle: Bundle, *, served: bool = False) -> SamplingConfig:
    """How the checkpoint's generation_config.json says that tokens are drawn, as transformers reads it.

    That is greedy, with the repetition penalty, unless do_sample is true, and then a top_k that is missing is 50.
    served: as vLLM's server reads it: the values alone count, whatever do_sample says; a temperature that is missing is
    1. Raises BundleError: a value of the wrong kind or out of its range.
    """
    text = bundle.read_text(_GENERATION_CONFIG) or "{}"
    file, advice = str(bundle.folder / _GENERATION_CONFIG), "Correct it in the checkpoint and export again"
    said = parse_json(text, _Said, file, BundleError, advice)
    penalty = 1.0 if said.repetition_penalty is None else said.repetition_penalty
    try:
        if not (served or said.do_sample):
            return SamplingConfig(repetition_penalty=penalty)
        return SamplingConfig(
            temperature=1.0 if said.temperature is None else said.temperature,
            top_p=1.0 if said.top_p is None else said.top_p or SMALLEST_TOP_P,
            top_k=(0 if served else _TOP_K) if said.top_k is None else max(said.top_k, 0),
            min_p=said.min_p or 0.0,
            repetition_penalty=penalty,
        )
    except InvalidInput as error:
        raise BundleError(f"{file}: {error}. {advice}") from error
