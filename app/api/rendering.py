"""Renders profiles as JSON. Cached values are JSON already and are inserted without decoding."""

from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec
from msgspec import UNSET

from app.api.schemas import FeatureDetail
from app.features.registry import Registry, indices
from app.features.views import view
from app.profiles.online.cache_protocol import FeatureValue

_encode = msgspec.json.Encoder().encode


class Renderer:
    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self._names = [_encode(name) + b":" for name in registry.names]
        self.template = lru_cache(maxsize=1_024)(self._template)

    def _template(self, mask: int) -> bytes:
        """The response for one user and the features in the mask, with a `%b` for the user id and for each value."""
        return b'{"user_id":%b,"features":{' + b",".join([self._names[i] + b"%b" for i in indices(mask)]) + b"}}"

    def values(self, profile: Mapping[int, FeatureValue], mask: int) -> bytes:
        """The JSON object `{name: value, …}` of the features in the mask, in the order of the registry."""
        return b"{" + b",".join([self._names[index] + profile[index].json for index in indices(mask)]) + b"}"

    def profile(self, user_id: str, profile: Mapping[int, FeatureValue], mask: int, *, detail: bool = False) -> bytes:
        """The JSON body for one user. With `detail`, each feature has its dtype, times and origin (`FeatureDetail`)."""
        if detail:
            names = self.registry.names
            features = _encode({names[index]: self._detail(index, profile[index]) for index in indices(mask)})
        else:
            features = self.values(profile, mask)
        return b'{"user_id":' + _encode(user_id) + b',"features":' + features + b"}"

    def batch(self, user_ids: Sequence[str], values: Mapping[str, Sequence[bytes]], mask: int) -> bytes:
        """The JSON body for many users, in the order of `user_ids`, in which an id may repeat. `values` holds, for each
        user, the JSON of the features in the mask."""
        template = self.template(mask)
        rendered = {user_id: template % (_encode(user_id), *found) for user_id, found in values.items()}
        return b'{"profiles":[' + b",".join([rendered[user_id] for user_id in user_ids]) + b"]}"

    def _detail(self, index: int, value: FeatureValue) -> FeatureDetail:
        return view(
            FeatureDetail,
            value,
            value=msgspec.Raw(value.json),
            dtype=self.registry[index].dtype,
            origin="unproven" if value.unproven else "cache" if value.cached else "computed",
            error=value.error if value.error is not None else UNSET,
        )
