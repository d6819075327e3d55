"""StreamedRows: a tall array whose rows are made while they are read, so that it never lies in memory as a whole.

The patches of a long video are one: minutes of film are gigabytes as float32, of which the vision stage wants a few
frames at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]


class StreamedRows:
    """float32 [rows, columns]. Slices in ascending order cost nothing more; going back begins again.

    `numpy.asarray` makes the whole array. It has the shape, dtype and ndim of one.
    """

    ndim = 2
    dtype: np.dtype[np.float32] = np.dtype(np.float32)

    def __init__(self, rows: int, columns: int, parts: Callable[[], Iterator[Float32Array]]) -> None:
        """Describe the rows; parts begins to make them, in order: float32 [some rows, columns] each."""
        self.shape = (rows, columns)
        self.parts = parts
        self._begin()

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Float32Array:
        start, stop, _ = rows.indices(len(self))
        if start < self._position:
            self._begin()
        while self._position < start:
            self._take(start - self._position)
        out = np.empty((max(stop - start, 0), self.shape[1]), np.float32)
        filled = 0
        while filled < len(out):
            part = self._take(len(out) - filled)
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self[:].astype(self.dtype if dtype is None else dtype, copy=False)

    def _begin(self) -> None:
        self._source = self.parts()
        self._rest = np.empty((0, self.shape[1]), np.float32)
        self._position = 0

    def _take(self, most: int) -> Float32Array:
        """The next rows, up to so many."""
        if not len(self._rest):
            self._rest = next(self._source)
        taken, self._rest = self._rest[:most], self._rest[most:]
        self._position += len(taken)
        return taken


def joined_rows(parts: "Sequence[Float32Array | StreamedRows]") -> "Float32Array | StreamedRows":
    """Arrays below each other; streamed where one of them is."""
    if len(parts) == 1:
        return parts[0]
    if not any(isinstance(part, StreamedRows) for part in parts):
        return np.concatenate([np.asarray(part) for part in parts])

    def pieces() -> Iterator[Float32Array]:
        return chain.from_iterable(part.parts() if isinstance(part, StreamedRows) else iter((part,)) for part in parts)

    return StreamedRows(sum(len(part) for part in parts), parts[0].shape[1], pieces)
