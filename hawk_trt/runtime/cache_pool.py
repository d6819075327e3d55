"""Which KV cache of ONNX Runtime a generation gets.

On a GPU caches are shared: a prompt takes free slots beside those that run, a cache outlives its generations, and its
columns are whole steps of _COLUMN_STEP. So tensors stay at their addresses, which a captured decode step needs, and
rows come and go without a copy. On the CPU every column costs time: a cache has the rows and columns that were asked
for, and is gone with them.
"""

from collections.abc import Mapping

from hawk_trt.runtime.kv_cache import KVCache
from hawk_trt.runtime.session import Stage

# Memory-efficient attention of ONNX Runtime asks for multiples of 4 or 8; captured steps are few where sizes are few.
_COLUMN_STEP = 256
# An idle cache serves a generation unless it has so many times the columns, all of which attention would read.
_MOST_EXCESS = 4


class CachePool:
    """The caches of a backend.

    Attributes:
        shared: whether generations share caches.
    """

    def __init__(self, stages: Mapping[str, Stage], *, shared: bool) -> None:
        self.shared = shared
        self._stages = stages
        self._caches: list[KVCache] = []  # shared ones, in use or idle

    def take(self, count: int, columns: int) -> tuple[KVCache, list[int]]:
        """Empty slots side by side."""
        for cache in self._caches:
            excess = cache.is_idle and cache.columns > max(_MOST_EXCESS * columns, _COLUMN_STEP)
            slots = None if cache.columns < columns or excess else cache.find(count)
            if slots is not None:
                cache.take(slots)
                return cache, list(slots)
        cache = self._new(count, columns)
        cache.fill()
        cache.take(range(count))
        return cache, list(range(count))

    def gather(self, parts: list[tuple[KVCache, int]], columns: int) -> tuple[KVCache, list[int]]:
        """Rows of several caches in one: the largest of theirs where the others fit in beside its own, else a new one.

        Returns:
            The cache, and the slot of each row.
        """
        for cache in sorted({id(cache): cache for cache, _ in parts}.values(), key=lambda cache: -cache.slots):
            guests = [number for number, (home, _) in enumerate(parts) if home is not cache]
            if self.shared and cache.columns >= columns and len(guests) <= len(cache.free):
                slots = [row for _, row in parts]
                break
        else:
            guests, slots = list(range(len(parts))), list(range(len(parts)))
            cache = self._new(len(parts), columns)
        moved, places = [parts[number] for number in guests], sorted(cache.free)[: len(guests)]
        for number, place in zip(guests, places, strict=True):
            slots[number] = place
        cache.take(places)
        homes = {id(home): home for home, _ in moved}.values()
        spent = [home for home in homes if home.slots - len(home.free) == sum(other is home for other, _ in moved)]
        self._caches = [home for home in self._caches if home not in spent]
        cache.carry(moved, places, spent)
        for home, row in moved:
            home.give_back([row])
        return cache, slots

    def give_back(self, cache: KVCache, slots: Mapping[int, int]) -> None:
        """Free the slots of some rows. Of the caches that nobody uses only the largest stays."""
        cache.give_back(slots.values())
        idle = sorted((c for c in self._caches if c.is_idle), key=lambda c: c.slots * c.columns)
        self._drop(idle[:-1])

    def close(self) -> None:
        """Let go of all caches."""
        self._drop(list(self._caches))

    def _new(self, slots: int, columns: int) -> KVCache:
        if not self.shared:
            return KVCache(self._stages, slots, columns, shared=False)
        self._drop([cache for cache in self._caches if cache.is_idle])
        columns = -(-(columns + 1) // _COLUMN_STEP) * _COLUMN_STEP - 1
        cache = KVCache(self._stages, slots, columns, shared=True)
        self._caches.append(cache)
        return cache

    def _drop(self, caches: list[KVCache]) -> None:
        for cache in caches:
            cache.forget_steps()
            self._caches.remove(cache)
