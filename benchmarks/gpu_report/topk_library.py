"""hawk::WeightedTopK through ctypes: raw addresses in, indices and scores written where they should go.

The same calls drive the kernel on a GPU, the kernel compiled for a CPU, and the TensorRT plugin's own enqueue().
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from hawk_trt.errors import BackendError, InvalidInput
from hawk_trt.stages import NORMALIZATIONS


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one call: rows, heads of a row, positions of a row, positions kept of a row."""

    batch: int
    heads: int
    seq_len: int
    num_kept: int


@dataclass(frozen=True, slots=True)
class Addresses:
    """Of contiguous tensors, on the device that the library runs on."""

    head_scores: int  # (batch, heads, seq_len) float32
    head_weights: int  # (heads) float32
    visual_rows: int  # (batch, seq_len) int64, below 0 where a position is not visual
    select_bias: int  # (batch, seq_len) float32
    kept_indices: int  # (batch, num_kept) int32, written
    scores: int  # (batch, seq_len) float32, written


class TopK(Protocol):
    """What enqueues the rule on a stream."""

    def workspace_bytes(self, sizes: Sizes) -> int:
        """Scratch that a call of these sizes needs."""
        ...

    def enqueue(self, addresses: Addresses, sizes: Sizes, workspace: int, stream: int) -> None:
        """Enqueue; raises BackendError where it is refused."""
        ...


_POINTERS = [ctypes.c_void_p] * 6
_SIZES = [ctypes.c_int64] * 4


class KernelLibrary:
    """The kernel alone: libhawk_topk.so, for a GPU or for the CPU."""

    def __init__(self, path: Path, normalization: str) -> None:
        self.path = path
        self._normalization = _index(normalization)
        self._library = _load(path)
        self._library.hawk_topk_workspace_bytes.argtypes = [ctypes.c_int64] * 3
        self._library.hawk_topk_workspace_bytes.restype = ctypes.c_size_t
        self._library.hawk_topk.argtypes = [ctypes.c_int32, *_POINTERS, *_SIZES, ctypes.c_void_p, ctypes.c_void_p]
        self._library.hawk_topk.restype = ctypes.c_int32
        self._library.hawk_topk_error.argtypes = [ctypes.c_int32]
        self._library.hawk_topk_error.restype = ctypes.c_char_p

    def workspace_bytes(self, sizes: Sizes) -> int:
        """Scratch that a call of these sizes needs."""
        return int(self._library.hawk_topk_workspace_bytes(sizes.batch, sizes.heads, sizes.seq_len))

    def enqueue(self, addresses: Addresses, sizes: Sizes, workspace: int, stream: int) -> None:
        """Enqueue on a stream (on the CPU: run, with the stream as the seed of the schedule)."""
        status = self._library.hawk_topk(
            self._normalization, *_pointers(addresses), *_sizes(sizes), workspace, stream or None
        )
        if status != 0:
            reason = self._library.hawk_topk_error(status).decode()
            raise BackendError(f"weighted top-k of {sizes}: {reason}")


class PluginLibrary:
    """The TensorRT plugin's own enqueue(), made through getCreators() as TensorRT does; no TensorRT is loaded.

    harness: libhawk_plugin_harness.so, which make plugin-check builds beside libhawk_trt_plugin.so.
    """

    def __init__(self, plugin: Path, harness: Path, normalization: str) -> None:
        _index(normalization)
        self._library = _load(harness)
        self._library.hawk_plugin_create.argtypes = [ctypes.c_char_p, ctypes.c_char_p]
        self._library.hawk_plugin_create.restype = ctypes.c_void_p
        self._library.hawk_plugin_workspace_bytes.argtypes = [ctypes.c_void_p, *_SIZES]
        self._library.hawk_plugin_workspace_bytes.restype = ctypes.c_size_t
        self._library.hawk_plugin_enqueue.argtypes = [
            ctypes.c_void_p,
            *_POINTERS,
            *_SIZES,
            ctypes.c_void_p,
            ctypes.c_void_p,
        ]
        self._library.hawk_plugin_enqueue.restype = ctypes.c_int32
        self._library.hawk_plugin_destroy.argtypes = [ctypes.c_void_p]
        self._library.hawk_plugin_destroy.restype = None
        self._plugin = self._library.hawk_plugin_create(str(plugin.resolve()).encode(), normalization.encode())
        if not self._plugin:
            raise BackendError(f"{plugin}: no plugin could be made of it. Rebuild: make plugin")

    def close(self) -> None:
        """Destroy the plugin."""
        self._library.hawk_plugin_destroy(self._plugin)
        self._plugin = None

    def workspace_bytes(self, sizes: Sizes) -> int:
        """What getWorkspaceSize() says of a profile whose largest sizes these are."""
        return int(self._library.hawk_plugin_workspace_bytes(self._plugin, *_sizes(sizes)))

    def enqueue(self, addresses: Addresses, sizes: Sizes, workspace: int, stream: int) -> None:
        """Call the plugin on a stream."""
        status = self._library.hawk_plugin_enqueue(
            self._plugin, *_pointers(addresses), *_sizes(sizes), workspace, stream or None
        )
        if status != 0:
            raise BackendError(f"enqueue() of {sizes}: status {status}; its reason is above")


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path.resolve()))
    except OSError as error:
        raise BackendError(f"{path}: cannot be loaded ({error}). Build it: make plugin") from None


def _index(normalization: str) -> int:
    if normalization not in NORMALIZATIONS:
        raise InvalidInput(f"normalization: got {normalization!r}, expected one of {', '.join(NORMALIZATIONS)}")
    return NORMALIZATIONS.index(normalization)


def _pointers(addresses: Addresses) -> tuple[int, ...]:
    return (
        addresses.head_scores,
        addresses.head_weights,
        addresses.visual_rows,
        addresses.select_bias,
        addresses.kept_indices,
        addresses.scores,
    )


def _sizes(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.batch, sizes.heads, sizes.seq_len, sizes.num_kept)
