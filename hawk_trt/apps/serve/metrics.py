"""What a server counts and times, for Prometheus."""

from collections.abc import Iterator
from dataclasses import fields
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from hawk_trt.apps.serve.batcher import Batcher
from hawk_trt.request import Result, Timings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics(Collector):
    """The metrics of one server, in a registry of their own. Each says in Prometheus's text what it counts."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._registry = registry = CollectorRegistry()
        counter = partial(Counter, registry=registry)
        histogram = partial(Histogram, registry=registry, buckets=_SECONDS)
        status = "Requests by route and status; 499: the client left."
        self.requests = counter("hawk_requests", status, ("route", "status"))
        self.first_token_seconds = histogram(
            "hawk_first_token_seconds", "From a request to the first text of its answer."
        )
        self.request_seconds = histogram("hawk_request_seconds", "From a request to the end of its answer.")
        self.broken_streams = counter("hawk_broken_streams", "Answers that ended in an error after they had begun.")
        self._tokens = counter("hawk_tokens", "Tokens by kind.", ("kind",))
        self._known = counter("hawk_vision_cache_hits", "Images that the vision stage did not run for.")
        self._stages = histogram("hawk_stage_seconds", "Time by stage; a batch's in each answer.", ("stage",))
        for name, help_text, value in (
            ("hawk_queued_requests", "Requests that wait for a place in the batch.", lambda: batcher.queued),
            ("hawk_running_requests", "Requests in the batch.", lambda: batcher.running),
            ("hawk_kv_cache_bytes", "Bytes of the KV caches in use.", lambda: batcher.cache_bytes),
        ):
            Gauge(name, help_text, registry=registry).set_function(value)
        registry.register(self)
        ProcessCollector(registry=registry)

    def answered(self, result: Result, prompt_tokens: int) -> None:
        """Count a complete answer."""
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("completion").inc(len(result.token_ids))
        self._tokens.labels("visual").inc(result.num_visual)
        self._tokens.labels("kept_visual").inc(result.num_kept)
        self._known.inc(result.num_cached)
        for stage in fields(Timings):
            self._stages.labels(stage.name).observe(getattr(result.timings, stage.name))

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What the batcher itself counts."""
        counters = self._batcher.counters
        for field in fields(counters):
            family = CounterMetricFamily(f"hawk_batcher_{field.name}", f"{field.name} of the batcher.")
            family.add_metric((), getattr(counters, field.name))
            yield family
