"""What lmms-eval and VLMEvalKit give a model, for machines without them; only what an adapter meets."""

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from types import ModuleType


class CacheHook:
    """lmms_eval.api.model.CacheHook: is told every answer."""

    def add_partial(self, attr, req, res):
        """Nothing is cached."""


class lmms:  # noqa: N801 - its name
    """lmms_eval.api.model.lmms."""

    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook()
        self.task_dict = {}

    @property
    def rank(self):
        """Of this process."""
        return self._rank

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config):
        """Numbers where they look like some, as lmms-eval reads --model_args."""
        arguments = dict(part.split("=", 1) for part in arg_string.split(","))
        arguments = {
            key: float(value) if value.replace(".", "").isdigit() else value for key, value in arguments.items()
        }
        return cls(**arguments, **{key: value for key, value in additional_config.items() if value is not None})


@dataclass
class TokenCounts:
    """lmms_eval.api.instance.TokenCounts."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None

    def to_dict(self):
        """The counts that are known."""
        return {name: value for name, value in vars(self).items() if value is not None and "visual" not in name}


@dataclass
class GenerationResult:
    """lmms_eval.api.instance.GenerationResult."""

    text: str
    token_counts: TokenCounts | None = None


class BaseModel:
    """vlmeval.vlm.base.BaseModel."""

    def generate(self, message, dataset=None):
        """Hand a list of parts to the model."""
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        """Hand a conversation to the model."""
        return self.chat_inner(messages, dataset=dataset)


def lmms_eval(monkeypatch):
    """The modules of lmms-eval that an adapter imports, where the package is not there."""
    if importlib.util.find_spec("lmms_eval") is None:
        _put(monkeypatch, "lmms_eval.api.model", lmms=lmms)
        _put(monkeypatch, "lmms_eval.api.instance", TokenCounts=TokenCounts, GenerationResult=GenerationResult)
        _put(monkeypatch, "lmms_eval.models.model_utils.gen_metrics", log_metrics=dict)


def vlmevalkit(monkeypatch):
    """The modules of VLMEvalKit that an adapter imports, where the package is not there; gives its supported_VLM."""
    if importlib.util.find_spec("vlmeval") is None:
        _put(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseModel)
        _put(monkeypatch, "vlmeval.config", supported_VLM={})
    config = importlib.import_module("vlmeval.config")
    monkeypatch.setattr(config, "supported_VLM", dict(config.supported_VLM))
    return config.supported_VLM


class VideoDataset:
    """What VLMEvalKit's inference_video reads of a data set, here with one question."""

    dataset_name, pack = "Video", False

    def __init__(self, nframe, fps):
        import pandas as pd

        self.nframe, self.fps = nframe, fps
        self.data = pd.DataFrame({"index": [0], "question": ["?"]})

    def build_prompt(self, number, video_llm):
        """The parts of a question."""
        return [{"type": "text", "value": f"Question {number}, {video_llm}?"}]


def _put(monkeypatch, name, **members):
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
    for member, value in members.items():
        monkeypatch.setattr(sys.modules[name], member, value, raising=False)
