"""The answers match the OpenAPI document, with every key and without: a short run of `make fuzz`."""

from collections.abc import Iterator

import pytest

from tests.fuzz.openapi import CALLERS, check
from tests.fuzz.service import FuzzedService, running_service
from tests.support.live import KEYS

pytestmark = pytest.mark.slow
# Most requests of the other callers are refused.
LEAST = {"admin": 1_000, "reader": 200, "writer": 200, "anonymous": 200}


@pytest.fixture(scope="module")
def site() -> Iterator[FuzzedService]:
    """Its own site: the requests erase users and rebuild all of them."""
    with running_service() as served:
        yield served


@pytest.mark.parametrize("caller", CALLERS)
def test_answers_are_as_the_document_says(site: FuzzedService, caller: str) -> None:
    if caller == "admin":
        asked = check(site.url, KEYS[caller], phases=("examples", "coverage"), ids=site.ids)
    else:
        asked = check(site.url, KEYS.get(caller), phases=("coverage",), mode="positive", ids=site.ids)
    assert not asked.findings, asked.output
    assert asked.cases >= LEAST[caller]
    assert "unexpected_error" not in site.log()
