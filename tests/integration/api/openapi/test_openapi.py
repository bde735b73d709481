"""The OpenAPI document, and its page, which must work without internet."""

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec
import pytest
import pytest_asyncio
from msgspec import UNSET, Meta, UnsetType

from app.events.validation import decode_json, decode_lines
from app.features.clock import DAY_MS, SystemClock
from app.features.contract import Contract
from app.features.registry import Registry
from app.features.schema import Int
from tests.integration.api.auth.test_access import TABLE
from tests.support.clock import FakeClock
from tests.support.entries import entry
from tests.support.features import ProfileFeatures
from tests.support.live import JSON, NDJSON, Live
from tests.support.longest_step import assert_no_long_step, longest_step
from tests.support.registry import REGISTRY
from tests.support.site import ServeSite

Document = dict[str, Any]
OPEN = {"/healthz", "/readyz", "/metrics"}
UNPROVEN = {"/profiles/{user_id}", "/profiles/{user_id}/detail", "/profiles/batch"}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def document(keyed: Live) -> Document:
    answer = await keyed.client.get("/schema/openapi.json")
    assert answer.status_code == 200
    assert "json" in answer.headers["content-type"]
    found: Document = answer.json()
    return found


def operations(document: Document) -> Iterator[tuple[str, str, Document]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def references(node: object) -> Iterator[str]:
    """Every `$ref` and discriminator target."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name in ("$ref", "mapping"):
                yield from [value] if isinstance(value, str) else value.values()
            else:
                yield from references(value)
    elif isinstance(node, list):
        for item in node:
            yield from references(item)


async def test_every_route_is_documented_except_pages_and_forms(document: Document) -> None:
    assert document["openapi"].startswith("3.1")
    documented = {f"{method.upper()} {path}" for path, method, _ in operations(document)}
    routes = {
        f"{access.method} {re.sub(r':[a-z]+}', '}', access.route)}"
        for access in TABLE
        if access.method != "HEAD" and not access.route.startswith("/schema")
    }
    pages = {"/admin/sign-in", "/admin/sign-out", "/admin/static/{file_path}"}
    forms = {"POST /admin/users/{user_id}/erase/confirm", "POST /admin/dead-letters/{letter_id}/discard"}
    forms.add("POST /admin/rebuilds/{run_id}/cancel")
    assert documented == {route for route in routes if route.split(" ")[1] not in pages} - forms


@pytest.mark.slow
async def test_first_request_for_the_document_does_not_block_others(serve_site: ServeSite) -> None:
    for path in ("/schema", "/schema/openapi.json"):

        async def run(path: str = path) -> float:
            async with serve_site() as site, longest_step() as step:
                assert (await site.client.get(path)).status_code == 200
            return step.seconds

        await assert_no_long_step(run)


async def test_every_reference_resolves(document: Document) -> None:
    found = set(references(document))
    assert len(found) > 20
    for reference in found:
        node: Any = document
        for part in reference.removeprefix("#/").split("/"):
            node = node[part]
        assert node


async def test_every_operation_is_described(document: Document) -> None:
    names = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(names) == len(set(names))
    tags = {tag["name"]: tag["description"] for tag in document["tags"]}
    for path, method, operation in operations(document):
        place = f"{method} {path}"
        assert operation["summary"], place
        assert set(operation["tags"]) <= tags.keys(), place
        statuses = operation["responses"].keys()
        assert "400" in statuses, place
        if path not in OPEN:
            assert {"401", "403"} <= statuses, place
        for parameter in re.findall(r"\{(\w+)\}", path):
            (declared,) = (item for item in operation["parameters"] if item["name"] == parameter)
            assert (declared["in"], declared["required"]) == ("path", True)
        for status, response in operation["responses"].items():
            assert response["description"], place
            if status.startswith("4") or status == "507" or (status == "503" and path != "/readyz"):
                schema = response["content"]["application/problem+json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Problem"}, place


async def test_every_operation_with_a_body_describes_it(document: Document) -> None:
    with_body = {path for path, _, operation in operations(document) if "requestBody" in operation}
    moves = {f"/admin/rollout/{move}" for move in ("ramp", "promote", "rollback")}
    switches = {f"/admin/features/{{name}}/{switch}" for switch in ("disable", "enable")}
    optional = {"/admin/users/{user_id}/rebuild", *moves, *switches}
    assert with_body == {
        "/profiles/batch",
        "/profiles/history",
        "/events",
        "/score",
        "/generate",
        "/admin/rebuilds",
        *optional,
    }
    for path in with_body:
        operation = document["paths"][path]["post"]
        assert operation["requestBody"]["required"] is (path not in optional)
        assert {"413", "415", "422"} <= operation["responses"].keys()
    assert document["paths"]["/events"]["post"]["requestBody"]["content"].keys() == {
        "application/json",
        "application/x-ndjson",
    }


async def test_examples_of_events_are_events(document: Document) -> None:
    content = document["paths"]["/events"]["post"]["requestBody"]["content"]
    examples = content["application/json"]["examples"]
    assert {
        type(item).__name__ for name in examples for item in decode_json(msgspec.json.encode(examples[name]["value"]))
    } == {
        "TipServed",
        "TipFeedback",
    }
    assert len(decode_lines(content["application/x-ndjson"]["example"].encode())) == 2


def example(document: Document, schema: Document) -> Any:
    """The first example of a schema, or one composed of the examples of its parts."""
    if "$ref" in schema:
        return example(document, document["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    if "examples" in schema:
        return schema["examples"][0]
    if schema.get("type") == "array":
        return [example(document, schema["items"])]
    if schema.get("type") == "string":
        return "ada"
    return {
        name: example(document, part)
        for name, part in schema["properties"].items()
        if name in schema.get("required", ()) or "examples" in part
    }


@pytest.mark.slow
async def test_examples_are_accepted_in_three_years(serve_site: ServeSite) -> None:
    clock = FakeClock(SystemClock().now_ms() + 3 * 365 * DAY_MS)
    async with serve_site(clock=clock) as later:
        document: Document = (await later.client.get("/schema/openapi.json")).json()
        assert "2026-04-25T" not in json.dumps(document)
        content = document["paths"]["/events"]["post"]["requestBody"]["content"]
        sent = [(JSON, msgspec.json.encode(item["value"])) for item in content["application/json"]["examples"].values()]
        for headers, raw in [*sent, (NDJSON, content["application/x-ndjson"]["example"].encode())]:
            answer = await later.client.post("/events", content=raw, headers=headers)
            assert answer.status_code == 202, answer.text
        for path in ("/profiles/batch", "/profiles/history", "/score", "/generate"):
            operation = document["paths"][path]["post"]
            body = example(document, operation["requestBody"]["content"]["application/json"]["schema"])
            answer = await later.client.post(path, json=body)
            assert answer.status_code == 200, (path, body, answer.text)
        parameters = document["paths"]["/profiles/{user_id}"]["get"]["parameters"]
        moments = {item["name"]: example(document, item["schema"]) for item in parameters if item["name"] == "as_of"}
        answer = await later.client.get("/profiles/ada", params=moments)
        assert (answer.status_code, len(moments)) == (200, 1), answer.text


@pytest.mark.slow
async def test_security_is_declared_with_keys_and_without(document: Document, site: Live) -> None:
    assert document["components"]["securitySchemes"]["key"] == {"type": "apiKey", "name": "X-API-Key", "in": "header"}
    assert document["security"] == [{"key": []}]
    for path, _, operation in operations(document):
        assert operation.get("security") == ([] if path in OPEN else None), path
    assert (await site.client.get("/schema/openapi.json")).json() == document


async def test_profile_has_the_type_of_the_mirror(document: Document) -> None:
    schemas = document["components"]["schemas"]
    features = schemas["ProfileFeatures"]["properties"]
    assert list(features) == list(REGISTRY.names)
    assert {name: schema["description"] for name, schema in features.items()} == {
        item.name: item.description for item in REGISTRY
    }
    for name in ("ProfileAnswer", "HistoryRow"):
        assert schemas[name]["properties"]["features"] == {"$ref": "#/components/schemas/ProfileFeatures"}
    details = schemas["ProfileDetails"]["properties"]
    assert {name: detail["$ref"].rpartition("/")[2] for name, detail in details.items()} == {
        item.name: f"{item.dtype.capitalize()}Detail" for item in REGISTRY
    }
    assert schemas["IntDetail"]["properties"]["value"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}


async def test_fields_are_required_when_the_other_side_relies_on_them(document: Document) -> None:
    schemas = document["components"]["schemas"]
    assert schemas["ScoreRequest"]["required"] == ["user_id", "candidates"]
    assert schemas["BatchRequest"]["required"] == ["user_ids"]
    assert schemas["Problem"]["required"] == ["type", "title", "status", "detail"]
    assert {"served", "completed"} <= set(schemas["DailyTips"]["required"])
    fields = [field for schema in schemas.values() for field in schema.get("properties", {}).values()]
    assert not [field for field in fields if "default" in field]
    assert "Default: true." in schemas["ScoreRequest"]["properties"]["explore"]["description"]


class Extended(ProfileFeatures, kw_only=True, frozen=True):
    probe: Annotated[Int | UnsetType, Meta(description="A feature of the tests.")] = UNSET


@pytest.mark.slow
async def test_feature_is_documented_when_it_is_added(serve_site: ServeSite) -> None:
    contract = Contract(registry=Registry([*REGISTRY, entry(default=7)]), mirror=Extended)
    async with serve_site(contract=contract) as site:
        found = (await site.client.get("/schema/openapi.json")).json()
        schema = found["components"]["schemas"]["ProfileFeatures"]["properties"]["probe"]
        assert schema["description"] == "A feature of the tests."
        assert (await site.features("u"))["probe"] == 0 + 7
        assert "probe" in (await site.client.get("/schema")).text


async def test_stale_if_error_is_documented_where_it_counts(document: Document, keyed: Live) -> None:
    again: Document = (await keyed.client.get("/schema/openapi.json")).json()
    for found in (document, again):
        with_header = {
            path: operation["responses"]["200"]["headers"].keys()
            for path, _, operation in operations(found)
            for parameter in operation.get("parameters", ())
            if (parameter["name"], parameter["in"]) == ("Cache-Control", "header")
        }
        assert with_header == {path: {"Cache-Status", "Age"} for path in UNPROVEN}
        parameters = [one for _, _, operation in operations(found) for one in operation.get("parameters", ())]
        assert sum(parameter["in"] == "header" for parameter in parameters) == len(UNPROVEN)
    assert "unproven" in document["components"]["schemas"]["FloatDetail"]["properties"]["origin"]["enum"]


async def test_page_loads_nothing_from_other_sites(site: Live) -> None:
    answer = await site.client.get("/schema")
    assert "docExpansion: 'none'" in answer.text
    assert answer.headers["content-type"].startswith("text/html")
    tags = re.findall(r"<(?:script|link|img|iframe|style)\b[^>]*>", answer.text)
    assert len(tags) >= 4
    loaded = [target for tag in tags for target in re.findall(r"(?:src|href)=[\"']([^\"']+)", tag)]
    assert loaded
    assert not re.search(r"@import|url\(", answer.text)
    for target in loaded:
        assert target.startswith(("/schema/assets/", "data:")), target
        if target.startswith("/"):
            asset = await site.client.get(target)
            assert asset.status_code == 200
            assert ("css" if target.endswith(".css") else "javascript") in asset.headers["content-type"]
            assert len(asset.content) > 10_000
            if target.endswith(".css"):
                assert not re.findall(r"(?:url\(|@import)\s*[\"']?https?:", asset.text)
