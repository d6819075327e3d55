"""The application as a Ray Serve deployment: a replica for each GPU, or for a share of the CPUs.

    serve run hawk_trt.apps.serve.ray_app:build path=/models/3b-engines max_replicas=4

Ray starts, scales, routes to, watches and replaces the replicas; each is the same application as `hawk-trt serve` has.
"""

import asyncio
from dataclasses import replace

import ray
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.metrics import Gauge

from hawk_trt.apps.serve.app import create_app
from hawk_trt.apps.serve.errors import RETRY_SECONDS
from hawk_trt.apps.serve.ray_options import ReplicaOptions, read_options
from hawk_trt.apps.serve.server import configure_logging
from hawk_trt.apps.serve.service import Service
from hawk_trt.errors import BackendError

NAME = "hawk"
_POLL_SECONDS = 0.05
_HEALTH_SECONDS = 5.0
_UPSCALE_SECONDS = 10.0
_DOWNSCALE_SECONDS = 300.0
_LAST_SECONDS = 10.0


class Replica:
    """What Ray asks a replica besides requests."""

    app: FastAPI  # of this replica, which serve.ingress adds

    def __init__(self) -> None:
        self._gauges: dict[str, Gauge] = {}

    async def check_health(self) -> None:
        """Return once the model is warm; Ray sends no request before that, and asks again all the time.

        BackendError where the model cannot answer any more: Ray then starts another replica.
        """
        service: Service = self.app.state.service
        while service.state == "starting":
            await asyncio.sleep(_POLL_SECONDS)
        if service.state == "failed" or not (service.batcher.ready or service.state == "draining"):
            raise BackendError(f"replica: it is {service.state} and cannot answer; its log says why")
        self._publish(service.metrics.text())

    def _publish(self, text: bytes) -> None:
        """Set Ray's gauges to Prometheus's text; counts and buckets keep their names and still only grow.

        A request to /metrics reaches any one replica; Ray's own metrics port tells of all of them.
        """
        for family in text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                if not sample.name.startswith("hawk_") or sample.name.endswith("_created"):
                    continue
                if sample.name not in self._gauges:
                    self._gauges[sample.name] = Gauge(sample.name, family.documentation, tuple(sample.labels))
                self._gauges[sample.name].set(sample.value, tags=sample.labels)


def build(arguments: dict[str, object]) -> serve.Application:
    """Make the application that `serve run`, `serve deploy` and `serve.run` take.

    Args:
        arguments: "path", a bundle or engines on every machine; any option of `hawk-trt serve` but host and port, as
            "keep_ratio"; "min_replicas" and "max_replicas", 1 unless given; "num_gpus" of a replica, 1 for engines
            and device cuda, else 0; "num_cpus" of a replica, those of "threads", else 1. A config file may override
            everything about replicas below deployments, name hawk.
    """
    options = read_options(arguments)
    settings = options.settings(options.path)  # a wrong one is refused before anything starts

    def make_app() -> FastAPI:
        return _replica_app(options)

    batch = options.rows
    deployment = serve.deployment(
        name=NAME,
        ray_actor_options=options.resources,
        autoscaling_config=AutoscalingConfig(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_ongoing_requests=batch,
            upscale_delay_s=_UPSCALE_SECONDS,
            downscale_delay_s=_DOWNSCALE_SECONDS,
        ),
        # one batch runs and one is ready to follow; what waits longer, waits where any replica can take it
        max_ongoing_requests=2 * batch,
        max_queued_requests=settings.max_queue * options.max_replicas,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS),
        graceful_shutdown_timeout_s=settings.request_seconds + _LAST_SECONDS,
        health_check_period_s=_HEALTH_SECONDS,
    )
    application: serve.Application = deployment(serve.ingress(make_app)(Replica)).bind()
    return application


def _replica_app(options: ReplicaOptions) -> FastAPI:
    """Load the model in a replica's process, which holds it until it ends."""
    settings = options.settings(options.path)
    configure_logging(settings.log_level)
    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    where = replace(options.where, threads=options.where.threads or max(1, int(cpus)))
    return create_app(*replace(options, where=where).open(options.path, settings))
