"""The compose files and Kubernetes manifests: valid by their schemas, known settings, no more rights than needed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from app.settings import Settings, hash_key
from tests.support.processes import ROOT
from tests.support.programs import required

DOCKER = ROOT / "docker"
ONE_HOST, SERVICES = (
    cast(dict[str, dict[str, Any]], yaml.safe_load((DOCKER / name).read_text())["services"])
    for name in ("compose.yaml", "compose.scale.yaml")
)
MANIFESTS: list[dict[str, Any]] = [
    manifest for path in sorted((DOCKER / "kubernetes").iterdir()) for manifest in yaml.safe_load_all(path.read_text())
]
PODS = {
    manifest["metadata"]["name"]: manifest["spec"]["template"]["spec"]
    for manifest in MANIFESTS
    if manifest["kind"] in {"Deployment", "Job"}
}
KEYS = f"admin:admin:{hash_key('key').hex()}"
UNITS = ["profiles-api.service", "profiles-worker@.service"]
# What the service takes to stop, after PROFILES_DRAIN_S.
STOP_S = 5


def settings(environment: dict[str, str]) -> Settings:
    """The settings of an environment of a compose file or of the ConfigMap."""
    given = {name: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value) for name, value in environment.items()}
    return Settings.from_environment({**given, "PROFILES_API_KEYS": KEYS})


def options_of(unit: str) -> dict[str, str]:
    """The options of a unit of systemd; of one that is given several times, the last."""
    return dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / "systemd" / unit).read_text(), re.MULTILINE))


def manifest(kind: str, name: str) -> dict[str, Any]:
    (found,) = (item for item in MANIFESTS if (item["kind"], item["metadata"]["name"]) == (kind, name))
    return found


def ports_of(pod: str) -> dict[str, int]:
    (container,) = PODS[pod]["containers"]
    return {port["name"]: port["containerPort"] for port in container["ports"]}


@pytest.mark.slow
def test_compose_files_are_valid() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    files = sorted(DOCKER.glob("compose*.yaml"))
    assert len(files) == 2
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_systemd_units_are_valid(tmp_path: Path) -> None:
    program = required("systemd", "systemd-analyze")
    for unit in (DOCKER / "systemd").iterdir():
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/profiles/bin/profiles", sys.executable))
    command = [program, "verify", "--recursive-errors=no", *map(str, tmp_path.iterdir())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS)
def test_systemd_waits_for_processes_that_stop(unit: str) -> None:
    options = options_of(unit)
    assert int(options["TimeoutStopSec"]) >= Settings().drain_s + STOP_S
    *_, script = shlex.split(options["ExecStart"])
    command = script.partition("; exec /opt/profiles/bin/profiles ")[2].split()
    assert subprocess.run([sys.executable, "-m", "app", *command, "--help"], check=False).returncode == 0


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.slow
def test_systemd_does_not_restart_a_service_with_invalid_settings(unit: str) -> None:
    options = options_of(unit)
    command = options["ExecStart"].replace("/opt/profiles/bin/profiles", f"{sys.executable} -m app")
    environment = {**os.environ, "PROFILES_DATABSE": "misspelt"}
    done = subprocess.run(shlex.split(command), env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert str(done.returncode) in options["RestartPreventExitStatus"].split(), done.stderr
    assert "ExecStartPre" not in options  # its exit status does not prevent a restart


@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_manifest_is_valid(version: str) -> None:
    import kubernetes_validate  # noqa: PLC0415  # takes a tenth of a second

    for item in MANIFESTS:
        assert kubernetes_validate.validate(item, version, strict=True) == version, item["metadata"]["name"]


def test_container_has_no_more_rights_than_it_needs() -> None:
    for name, service in (*ONE_HOST.items(), *SERVICES.items()):
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
    assert all(service["mem_limit"] for service in ONE_HOST.values())
    for name, service in SERVICES.items():
        assert {"cpus", "memory"} <= set(service["deploy"]["resources"]["limits"]), name
        # These two images name an account themselves.
        assert "user" in service or service["image"].startswith(("profiles:", "haproxy:")), name
        assert "ports" not in service or name == "balancer"


@pytest.mark.parametrize("name", PODS)
def test_pod_has_no_more_rights_than_it_needs(name: str) -> None:
    pod = PODS[name]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    rights = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert container["securityContext"] == rights
    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", ["api", "worker", "migrate"])
def test_settings_of_service_on_one_host_are_valid_and_it_has_time_to_stop(name: str) -> None:
    chosen = settings(ONE_HOST[name]["environment"])
    chosen.require_servers()
    assert int(ONE_HOST[name]["stop_grace_period"].removesuffix("s")) >= chosen.drain_s + STOP_S
    assert f"127.0.0.1:8000:{chosen.port}" in ONE_HOST["api"]["ports"]


@pytest.mark.parametrize("name", ["api-1", "api-2", "api-3", "worker-1", "worker-2", "migrate"])
def test_settings_of_service_are_valid_and_it_has_time_to_stop(name: str) -> None:
    service, balancer = SERVICES[name], SERVICES["balancer"]
    chosen = settings(service["environment"])
    assert int(service["stop_grace_period"].removesuffix("s")) >= chosen.drain_s + STOP_S
    (keep_alive,) = re.findall(r"timeout http-keep-alive (\d+)s", (DOCKER / "haproxy.cfg").read_text())
    assert chosen.keep_alive_s > int(keep_alive)
    assert str(chosen.trusted_proxies[0].network_address) == balancer["networks"]["inside"]["ipv4_address"]


def test_settings_of_manifests_are_valid_and_pods_have_time_to_stop() -> None:
    chosen = settings(manifest("ConfigMap", "profiles")["data"])
    api = PODS["profiles-api"]
    assert api["terminationGracePeriodSeconds"] >= chosen.drain_s + STOP_S
    assert ports_of("profiles-api") == {"http": chosen.port, "metrics": chosen.metrics_port}
    assert ports_of("profiles-worker") == {"metrics": chosen.worker_metrics_port}


@pytest.mark.slow
def test_pods_are_replaced_without_an_interruption() -> None:
    deployment = manifest("Deployment", "profiles-api")["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    (container,) = PODS["profiles-api"]["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"  # an outage of PostgreSQL restarts no pod
    labels = deployment["template"]["metadata"]["labels"]
    assert manifest("Service", "profiles-api")["spec"]["selector"] == labels
    assert manifest("PodDisruptionBudget", "profiles-api")["spec"]["selector"]["matchLabels"] == labels
    assert len({pod["containers"][0]["image"] for pod in PODS.values()}) == 1
