"""What a server counts and times, for Prometheus."""

from collections.abc import Iterator
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from hawk_trt.apps.serve.batcher import Batcher
from hawk_trt.request import Result, Timings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The metrics of one server, in a registry of their own.

    Attributes:
        requests: by route and status; 499 where the client left without an answer.
        first_token_seconds: from a request's headers to the first piece of its answer.
        request_seconds: from a request's headers to the end of its answer.
        broken_streams: answers that ended in an error after they had begun.
    """

    def __init__(self, batcher: Batcher) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "hawk_requests",
            "Requests by route and status; 499: the client left.",
            ("route", "status"),
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "hawk_first_token_seconds", "From a request to the first text of its answer.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.request_seconds = Histogram(
            "hawk_request_seconds", "From a request to the end of its answer.", buckets=_SECONDS, registry=registry
        )
        self.broken_streams = Counter(
            "hawk_broken_streams", "Answers that ended in an error after they had begun.", registry=registry
        )
        self._tokens = Counter("hawk_tokens", "Tokens by kind.", ("kind",), registry=registry)
        self._images_known = Counter(
            "hawk_vision_cache_hits", "Images that the vision stage did not run for.", registry=registry
        )
        self._stages = Histogram(
            "hawk_stage_seconds", "Time by stage; a batch's in each answer.", ("stage",), buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        queued = Gauge("hawk_queued_requests", "Requests that wait for a place in the batch.", registry=registry)
        queued.set_function(lambda: batcher.queued)
        running = Gauge("hawk_running_requests", "Requests in the batch.", registry=registry)
        running.set_function(lambda: batcher.running)
        cache = Gauge("hawk_kv_cache_bytes", "Bytes of the KV caches in use.", registry=registry)
        cache.set_function(lambda: batcher.cache_bytes)
        registry.register(_BatcherCounters(batcher))
        ProcessCollector(registry=registry)

    def answered(self, result: Result, prompt_tokens: int) -> None:
        """Count a complete answer."""
        for kind, count in (
            ("prompt", prompt_tokens),
            ("completion", len(result.token_ids)),
            ("visual", result.num_visual),
            ("kept_visual", result.num_kept),
        ):
            self._tokens.labels(kind).inc(count)
        self._images_known.inc(result.num_cached)
        for stage in fields(Timings):
            self._stages.labels(stage.name).observe(getattr(result.timings, stage.name))

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        return generate_latest(self._registry)


class _BatcherCounters(Collector):
    """What the batcher itself counts."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher

    def collect(self) -> Iterator[CounterMetricFamily]:
        counters = self._batcher.counters
        for field in fields(counters):
            family = CounterMetricFamily(f"hawk_batcher_{field.name}", f"{field.name} of the batcher.")
            family.add_metric((), getattr(counters, field.name))
            yield family
