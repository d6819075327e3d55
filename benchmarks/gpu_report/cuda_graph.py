"""Decode steps of ONNX Runtime's CUDA provider as CUDA graphs, without a change to the runtime that is measured.

A binding that is run again is a decode step: its tensors stand still. The second run of a binding is captured and later
ones are replays; every other run is told to stay out of graphs.
"""

import itertools
from typing import Any

import onnxruntime as ort

_DECODING = ("first_layer", "decoder")
_OUT_OF_GRAPHS = "-1"
_OPTION = "gpu_graph_id"


class GraphSession(ort.InferenceSession):  # type: ignore[misc]
    """A session that can capture; put it in the place of onnxruntime.InferenceSession before a pipeline is loaded.

    Attributes:
        capture: whether sessions capture now.
        captured: bindings captured so far.
    """

    capture = False
    captured = 0
    _numbers = itertools.count(1)

    def __init__(self, path: str, options: ort.SessionOptions, providers: list[Any]) -> None:
        if any(stage in path.rpartition("/")[2] for stage in _DECODING):
            providers = [
                (name, settings | {"enable_cuda_graph": "1"} if name.startswith("CUDA") else settings)
                for name, settings in providers
            ]
        self._can_capture = any("enable_cuda_graph" in settings for _, settings in providers)
        super().__init__(path, options, providers=providers)

    def run_with_iobinding(self, iobinding: Any, run_options: ort.RunOptions | None = None) -> None:  # noqa: ANN401
        """Run, inside a graph from a binding's second run on."""
        options = run_options or ort.RunOptions()
        if self._can_capture:
            graph = self._graph_of(iobinding)
            if getattr(iobinding, "hawk_told", None) != (options, graph):  # setting it again would warn
                options.add_run_config_entry(_OPTION, graph)
                iobinding.hawk_told = (options, graph)
        super().run_with_iobinding(iobinding, options)

    @staticmethod
    def _graph_of(binding: Any) -> str:  # noqa: ANN401
        seen = getattr(binding, "hawk_graph", None)
        if seen is None or not GraphSession.capture:
            binding.hawk_graph = _OUT_OF_GRAPHS
        elif seen == _OUT_OF_GRAPHS:
            GraphSession.captured += 1
            binding.hawk_graph = str(next(GraphSession._numbers))
        return str(binding.hawk_graph)
