"""FeatureMasks: what a mask of features asks of the cache, and how a hit is taken from what the cache holds.

Everything that is the same for each request with that mask is made once, for a warm read pays for every step.
"""

from __future__ import annotations

from collections.abc import Sequence

from app.features.registry import Registry, indices
from app.profiles.codec import hits

SHAPES_CAP = 1_024


class FeatureMask:
    """A mask of features, made ready to be asked of the cache and taken from its answers."""

    __slots__ = ("_hits", "features", "indices", "width")

    def __init__(self, registry: Registry, mask: int) -> None:
        self.indices = tuple(indices(mask))
        self.features = tuple(registry.names[index].encode() for index in self.indices)
        self.width = len(self.indices)
        self._hits = hits([registry[index].fingerprint.encode() for index in self.indices])

    def values(self, held: Sequence[bytes | None]) -> Sequence[bytes] | None:
        """The JSON of each feature where all are hits, else None. What every hit pays, so it does nothing more."""
        if None in held:
            return None
        return self._hits(held)  # type: ignore[arg-type]  # there is no None


class FeatureMasks(dict[int, FeatureMask]):
    """By mask, each made when it is first asked for. Masks are made of names in requests: no more than `SHAPES_CAP`."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self._registry = registry

    def __missing__(self, mask: int) -> FeatureMask:
        if len(self) >= SHAPES_CAP:
            self.clear()
        shape = self[mask] = FeatureMask(self._registry, mask)
        return shape
