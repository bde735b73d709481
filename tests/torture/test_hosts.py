"""Short runs on several hosts, and proof that they find the faults that are built into the service.

The program runs in namespaces of its own, so it is a process here.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT
from tests.support.programs import missing
from tests.torture.config import Config
from tests.torture.network import INSTALL, obstacle

RUN_S = 500.0
CLOSE = "--users 6 --clients 8 --hesitate 0.3:0.03 --rate 2 --seed 7 --minutes 5"


@pytest.fixture(scope="module")
def hosts() -> None:
    if (why := obstacle()) is not None:
        missing(why) if INSTALL in why else pytest.skip(why)


def run(arguments: str, **environment: str) -> tuple[int, str]:
    """The exit code of a run, and what it prints."""
    command = [sys.executable, "-m", "tests.torture", "--postgres", *arguments.split()]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_S, check=False
    )
    return done.returncode, done.stdout + done.stderr


def operations(output: str) -> int:
    found = re.search("^([0-9,]+) operations$", output, re.MULTILINE)
    return int(found[1].replace(",", "")) if found else 0


def test_faults_of_a_deployment_are_those_that_it_can_have() -> None:
    on_hosts, on_a_cluster = (set(Config(postgres=True, cluster=cluster).available()) for cluster in (False, True))
    assert {"api_killed", "clock_back", "restart_old", "postgres_failed_over"} < on_hosts
    assert "disk_full" not in on_hosts
    assert on_a_cluster - on_hosts > {"master_failed_over", "slots_moved"}
    assert "restart_old" not in on_a_cluster


def test_program_says_what_it_lacks_when_it_cannot_make_hosts(tmp_path: Path) -> None:
    code, output = run("", PATH=str(tmp_path))
    assert code == 2
    assert re.fullmatch(r"cannot run: several hosts need .*\n", output)


@pytest.mark.slow
@pytest.mark.usefixtures("hosts")
def test_every_answer_is_explained_when_hosts_and_servers_fail() -> None:
    code, output = run("--cluster --minutes 0.4 --rate 1.6 --users 12 --clients 8")
    assert code == 0, output
    assert operations(output) > 100, output


@pytest.mark.slow
@pytest.mark.usefixtures("hosts")
def test_read_on_one_host_reflects_the_event_on_another() -> None:
    code, output = run("--cluster --mode relay --operations 2000")
    assert code == 0, output
    assert operations(output) >= 2_000, output


@pytest.mark.slow
@pytest.mark.usefixtures("hosts")
@pytest.mark.parametrize(
    "mutant",
    [
        "standby_read --faults replay_paused",
        "open_gate --faults host_partitioned",
        "one_generation --faults master_failed_over --cluster",
    ],
)
def test_violation_is_found_when_the_service_is_a_mutant(mutant: str) -> None:
    code, output = run(f"{CLOSE} --mutant {mutant}")
    assert code == 1, output
    assert "no order explains it" in output
