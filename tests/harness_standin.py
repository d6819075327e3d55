"""The bases that lmms-eval and VLMEvalKit give a model, for machines without them; only what an adapter meets."""

from types import ModuleType


class CacheHook:
    """lmms_eval.api.model.CacheHook: is told every answer."""

    def add_partial(self, attr, req, res):
        """Nothing is cached."""


class lmms:  # noqa: N801 - its name
    """lmms_eval.api.model.lmms."""

    is_simple = True

    def __init__(self):
        self.cache_hook = CacheHook()
        self.task_dict = {}

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config):
        """Numbers where they look like some, as lmms-eval reads --model_args."""
        arguments = dict(part.split("=", 1) for part in arg_string.split(","))
        arguments = {
            key: float(value) if value.replace(".", "").isdigit() else value for key, value in arguments.items()
        }
        return cls(**arguments, **{key: value for key, value in additional_config.items() if value is not None})


class BaseModel:
    """vlmeval.vlm.base.BaseModel."""

    def generate(self, message, dataset=None):
        """Hand a list of parts to the model."""
        return self.generate_inner(message, dataset)


def modules(base, name):
    """Modules from which `name` can be imported, by their names, with the class in the last."""
    found = {}
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        found[".".join(parts[:end])] = ModuleType(".".join(parts[:end]))
    setattr(found[name], base.__name__, base)
    return found
