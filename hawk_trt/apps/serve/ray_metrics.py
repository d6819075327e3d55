"""A replica's metrics among Ray's, each with the replica's name: Prometheus's text in, Ray's gauges out.

A request to /metrics reaches any one replica; Ray's own metrics port tells of all of them.
"""

from prometheus_client.parser import text_string_to_metric_families
from ray.serve.metrics import Gauge

_OURS = "hawk_"


class RayMetrics:
    """Gauges of Ray that follow the metrics of a replica; counts and buckets keep their names and still only grow."""

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    def update(self, text: bytes) -> None:
        """Take over the values of now."""
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                if not sample.name.startswith(_OURS) or sample.name.endswith("_created"):
                    continue
                if sample.name not in self._gauges:
                    self._gauges[sample.name] = Gauge(sample.name, family.documentation, tuple(sample.labels))
                self._gauges[sample.name].set(sample.value, tags=sample.labels)
