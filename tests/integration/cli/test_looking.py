"""`features`, `profile`: what they show is what the service serves, and a wrong argument is named."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

from app.features.clock import DAY_MS, rfc3339
from app.features.export import FORMATS
from app.features.registry import DTYPES
from app.features.schema import check_mirror
from tests.integration.cli.conftest import Run
from tests.support.features import ProfileFeatures
from tests.support.registry import REGISTRY
from tests.support.traffic import now_ms

TYPESCRIPT = {"float": "number", "int": "number", "str": "string"}


def test_features_are_listed_as_table_and_json(profiles: Run) -> None:
    table = profiles("features")
    assert all(f" {entry.name} " in table.out and entry.description in table.out for entry in REGISTRY)
    listed = profiles("features", "--format", "json").json["features"]
    assert [one["name"] for one in listed] == list(REGISTRY.names)
    assert listed[0].keys() == {
        *("name", "dtype", "ttl_s", "window_s", "default", "description", "invalidated_by", "relations", "fingerprint")
    }


def test_json_schema_names_every_feature(profiles: Run) -> None:
    schema = profiles("features", "--format", "json-schema").json
    properties = schema["$defs"][ProfileFeatures.__name__]["properties"]
    assert list(properties) == list(REGISTRY.names)
    kinds = {"float": "number", "int": "integer", "str": "string"}
    for entry in REGISTRY:
        text = json.dumps(properties[entry.name])
        assert f'"type": "{kinds[entry.dtype]}"' in text
        assert '"type": "null"' in text
        assert json.dumps(entry.description) in text


def test_python_export_compiles_and_has_every_feature(profiles: Run) -> None:
    source = profiles("features", "--format", "python").out
    namespace: dict[str, Any] = {}
    exec(compile(source, "export", "exec", dont_inherit=True), namespace)  # noqa: S102  # our own export
    exported = namespace[ProfileFeatures.__name__]
    check_mirror(REGISTRY, exported)
    hints = get_type_hints(exported)
    assert {name: get_args(hints[name])[0] for name in exported.__struct_fields__} == {
        entry.name: DTYPES[entry.dtype] for entry in REGISTRY
    }
    assert {entry.name: entry.fingerprint for entry in REGISTRY} == exported.FINGERPRINTS
    formatted = [str(Path(sys.executable).with_name("ruff")), "format", "--line-length=120", "--check", "--quiet", "-"]
    assert subprocess.run(formatted, input=source, text=True, check=False).returncode == 0


def test_typescript_export_has_every_feature(profiles: Run) -> None:
    source = profiles("features", "--format", "typescript").out
    found = dict(re.findall(r"^  (\w+): (\w+) \| null;$", source, re.MULTILINE))
    assert found == {entry.name: TYPESCRIPT[entry.dtype] for entry in REGISTRY}
    assert source.count("export interface") == 1


def test_export_format_is_refused_when_it_is_unknown(profiles: Run) -> None:
    shown = profiles("features", "--format", "xml")
    assert shown.code == 2
    assert all(name in shown.err for name in FORMATS)


def test_profile_is_shown_for_any_user(lived_in: Run) -> None:
    found = lived_in("profile", "ann", "--json")
    assert found.json["user_id"] == "ann"
    assert found.json["features"]["tip_volume_30d"] == 29
    table = lived_in("profile", "ann").out
    assert re.search(r"tip_volume_30d .* 29 .* computed", table)
    assert lived_in("profile", "nobody", "--json").json["features"]["tip_volume_30d"] == 0


def test_past_profile_is_shown_when_a_time_is_given(lived_in: Run) -> None:
    moment = rfc3339(now_ms() - 5 * DAY_MS)
    then = lived_in("profile", "ann", "--json", "--as-of", moment).json["features"]
    assert then["tip_volume_30d"] == 30


def test_profile_is_refused_when_an_argument_is_wrong(migrated: Run) -> None:
    for command, message in {
        "a/b": "user_id: must not contain /",
        "..": "user_id: must not be . or ..",
        "ann --as-of yesterday": "--as-of: 'yesterday' is not a time; write it as 2026-04-25T08:30:00+02:00",
        "ann --as-of 2026-04-25T08:30:00": "--as-of: '2026-04-25T08:30:00' lacks a UTC offset",
        "ann --as-of 2999-01-01T00:00:00Z": "--as-of: lies in the future",
        "ann --as-of 2001-01-01T00:00:00Z": "--as-of: reaches back beyond kept history; the earliest possible",
    }.items():
        shown = migrated("profile", *command.split())
        assert (shown.code, message in shown.err) == (5, True), shown.err
