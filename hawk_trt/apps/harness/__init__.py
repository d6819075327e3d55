"""Public benchmarks on a bundle or on engines, through the harnesses that people compare with.

answering    questions -> answers, with a pruning; what it kept, and a trace
lmms_eval    a model of lmms-eval:       python -m lmms_eval --model hawk_trt --model_args bundle=DIR,keep_ratio=0.2
vlmevalkit   a model of VLMEvalKit:      python -m hawk_trt.apps.cli.vlmevalkit DIR -- --data MME

docs/reproduce.md has the commands for the paper's tables.
"""

from typing import Any


def lmms_eval_models() -> Any:  # noqa: ANN401 - lmms-eval ships no types
    """What lmms-eval asks for through the entry point in pyproject.toml: where its model class is."""
    from lmms_eval.models.registry_v2 import ModelManifest  # lmms-eval itself calls this

    return ModelManifest("hawk_trt", chat_class_path="hawk_trt.apps.harness.lmms_eval.HawkTrt")
