"""Units of work done by several workers on a Ray cluster.

Each worker is a Ray actor with a model of its own, on a GPU of its own where the plan names one; Ray
hands out the units, and starts a worker anew and its unit again when a machine is lost. Results come back here, so
that one process writes them. The checkpoint and the pictures must lie at the same paths on every machine.
"""

import os
from collections.abc import Iterator, Sequence

from hawk_trt.apps.calibrate.work import Plan, Scores, Unit
from hawk_trt.apps.calibrate.worker import Worker
from hawk_trt.errors import BackendError, HawkError, InvalidInput


def do_on_ray(plan: Plan, units: Sequence[Unit], shards: int, address: str | None) -> Iterator[tuple[Unit, Scores]]:
    """Do all units on a Ray cluster, in whatever order they end.

    shards: workers side by side. address: None is RAY_ADDRESS, else a cluster that runs on this machine, else one that
    is started here.
    """
    try:
        import ray  # only those who ask for shards need it
        from ray.exceptions import RayError, RayTaskError
        from ray.util import ActorPool
    except ImportError as error:
        raise InvalidInput(f"--shards needs Ray ({error}): pip install ray") from error
    gpus = int(plan.device.startswith("cuda"))
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise BackendError(f"Ray: no cluster at {address or os.environ.get('RAY_ADDRESS')} ({error})") from error
    try:
        resources = ray.cluster_resources()
        for name, needed in (("GPU", gpus * shards), ("CPU", shards)):
            if resources.get(name, 0) < needed:
                raise BackendError(
                    f"--shards {shards}: needs {needed} {name}s, the Ray cluster has {resources.get(name, 0):g}"
                )
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(Worker)
        pool = ActorPool([remote.remote(plan) for _ in range(min(shards, len(units)))])
        yield from pool.map_unordered(lambda worker, unit: worker.do.remote(unit), units)
    except RayTaskError as error:
        if isinstance(error.cause, HawkError):
            raise error.cause from error
        raise BackendError(f"Ray: a worker failed ({error.cause!r}). HAWK_DEBUG=1 shows where") from error
    except RayError as error:
        raise BackendError(f"Ray: {error}. What was answered is kept; go on with the same command") from error
    finally:
        ray.shutdown()
