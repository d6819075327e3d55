"""Rows that are made while they are read: the patches of a long video, which are too many for memory."""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]


class StreamedRows:
    """float32 [rows, columns] of which slices are made, best in ascending order; `numpy.asarray` makes the whole."""

    ndim = 2
    dtype: np.dtype[np.float32] = np.dtype(np.float32)

    def __init__(self, rows: int, columns: int, parts: Callable[[], Iterator[Floats]]) -> None:
        """Describe the rows; parts begins to make them, in order: float32 [some rows, columns] each."""
        self.shape = (rows, columns)
        self.parts = parts
        self._begin()

    @classmethod
    def joined(cls, parts: "Sequence[Floats | StreamedRows]") -> "StreamedRows":
        """Rows below each other."""

        def pieces() -> Iterator[Floats]:
            return chain.from_iterable(part.parts() if isinstance(part, StreamedRows) else [part] for part in parts)

        return cls(sum(len(part) for part in parts), parts[0].shape[1], pieces)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Floats:
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

    def _take(self, most: int) -> Floats:
        """The next rows, up to so many."""
        if not len(self._rest):
            self._rest = next(self._source)
        taken, self._rest = self._rest[:most], self._rest[most:]
        self._position += len(taken)
        return taken
