"""`make durability`: the test of a killed API, for as many kills as one likes. Exit code 1 where anything was lost."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from time import monotonic

from app.stores.sqlite.migrate import migrate
from app.stores.valkey.embedded import EmbeddedServer, cache_options, queue_options
from tests.support.fleet import Fleet
from tests.support.killing import Ingest
from tests.support.processes import Programs

SHOWN = 20


async def run(kills: int, clients: int, seed: int, directory: Path) -> int:
    """Run, and report; the number of faults."""
    with ExitStack() as stack:
        servers = []
        for name, options in (("cache", cache_options(64)), ("queue", queue_options())):
            server = EmbeddedServer(directory / name, directory / f"{name}.sock", options)
            server.start()
            stack.callback(server.kill)
            servers.append(server)
        migrate(directory / "profiles.db")
        programs = Programs(directory)
        stack.callback(programs.close)
        fleet = Fleet(programs, directory / "profiles.db", *servers)
        (first,) = await fleet.apis(1)
        ingest = Ingest(fleet, first, kills=kills, clients=clients, seed=seed)
        began = monotonic()
        await ingest.run()
    print(
        f"seed {seed}: {ingest.killed} kills in {monotonic() - began:,.0f} s under {clients} clients; "
        f"{sum(ingest.acknowledged.values()):,} events acknowledged in {ingest.answers:,} answers, "
        f"{ingest.unanswered:,} requests without an answer, {ingest.known_before:,} events of these were stored before "
        f"the kill and known when sent again; {len(ingest.faults)} faults"
    )
    for fault in ingest.faults[:SHOWN]:
        print(f"  {fault}")
    return len(ingest.faults)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="pf-"))
    try:
        faults = asyncio.run(run(chosen.kills, chosen.clients, chosen.seed, directory))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
