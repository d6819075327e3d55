"""How much memory a build needs, before it starts: an hour of work that ends in an out-of-memory kill helps nobody."""

from collections.abc import Sequence

from .prepare import PreparedGraph

# TensorRT holds the weights as read, in its network, for its tactics and in the plan: three to four times.
BUILD_FACTOR = 4


def memory_warning(graphs: Sequence[PreparedGraph], available_bytes: int | None) -> str | None:
    """A warning where the largest stage may not fit, None where it does or nothing is known.

    Args:
        graphs: to be built, one after another.
        available_bytes: free memory; on a Jetson the GPU shares it.
    """
    largest = max(graphs, key=lambda graph: graph.weight_bytes)
    needed = largest.weight_bytes * BUILD_FACTOR
    if available_bytes is None or needed <= available_bytes:
        return None
    return (
        f"{largest.stage}: {largest.weight_bytes / 1e9:.1f} GB of weights may need {needed / 1e9:.1f} GB of memory to "
        f"build, {available_bytes / 1e9:.1f} GB are free. If the build is killed: close other programs, add swap"
    )
