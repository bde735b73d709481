"""docker/observability: rules, alerts and dashboard, by promtool and against the metrics of the code."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.metrics import metric_names
from tests.support.processes import ROOT
from tests.support.programs import required

DIRECTORY = ROOT / "docker" / "observability"
DASHBOARD = json.loads((DIRECTORY / "grafana" / "dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
RULES = [rule for group in yaml.safe_load((DIRECTORY / "rules.yml").read_text())["groups"] for rule in group["rules"]]
OWN = re.compile(r"\b(?:profiles|process)_[a-z_]+(?!\w)")


@pytest.fixture(scope="module")
def promtool() -> str:
    return required("prometheus", "promtool")


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_rules_do_what_their_tests_say(promtool: str) -> None:
    run(promtool, "test", "rules", DIRECTORY / "rules_test.yml")
    run(promtool, "check", "config", DIRECTORY / "prometheus.yml")


def test_every_alert_is_tested() -> None:
    tests = yaml.safe_load((DIRECTORY / "rules_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", ()) if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in RULES if "alert" in rule}


def test_queries_name_metrics_that_exist() -> None:
    known = metric_names()
    for query in [*QUERIES, *(rule["expr"] for rule in RULES)]:
        for name in OWN.findall(re.sub(r"\{[^}]*\}", "", query)):
            assert {name, re.sub("_(bucket|count|sum)$", "", name)} & known, f"{name} in {query}"


def test_recorded_series_are_used_by_their_name() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    used = {
        name for query in QUERIES + [rule["expr"] for rule in RULES] for name in re.findall(r"profiles:\w+:?\w+", query)
    }
    assert used == recorded


def test_dashboard_shows_the_data_source_that_is_chosen() -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    chosen = {"type": "prometheus", "uid": "${" + variable["name"] + "}"}
    assert all(panel["datasource"] == chosen for panel in DASHBOARD["panels"] if panel["type"] != "row")


def test_queries_of_the_dashboard_are_valid(promtool: str, tmp_path: Path) -> None:
    rules = [
        {"record": f"query_{number}", "expr": query.replace("$__rate_interval", "1m")}
        for number, query in enumerate(QUERIES)
    ]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    run(promtool, "check", "rules", path)


def test_compose_mounts_files_that_exist() -> None:
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    mounted = [volume.split(":") for name in ("prometheus", "grafana") for volume in services[name]["volumes"]]
    for source, *_ in mounted:
        assert not source.startswith(".") or (ROOT / "docker" / source).is_file(), source
    assert {services[name]["profiles"][0] for name in ("prometheus", "grafana")} == {"observability"}
