"""The TypeScript client: packed, installed into a project, compiled strictly, and run by Node against the service."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from app.features.definitions import REGISTRY as SERVED
from app.features.export import typescript
from app.features.schema import ProfileFeatures
from app.stores.sqlite.features import compile_registry
from tests.support.live import KEYS, Live
from tests.support.node import PINNED, node, node_modules
from tests.support.processes import ROOT
from tests.support.readme import Reader, blocks_of
from tests.support.registry import REGISTRY

pytestmark = pytest.mark.slow

PACKAGE = ROOT / "app" / "clients" / "typescript"
TSC = "typescript/bin/tsc"
STRICT = ["--strict", "--exactOptionalPropertyTypes", "--noUncheckedIndexedAccess", "--noUnusedLocals"]
NODE_TARGET = ["--module", "nodenext", "--target", "es2022", "--types", "node"]


def copied(directory: Path) -> Path:
    """A copy of the package, without what a developer has built in it."""
    return Path(shutil.copytree(PACKAGE, directory, ignore=shutil.ignore_patterns("node_modules", "dist", "*.tgz")))


def npm(*arguments: str, cwd: Path) -> str:
    node_modules()
    path = os.pathsep.join((str(node_modules() / ".bin"), os.environ["PATH"]))
    command = ["npm", *arguments, "--no-audit", "--no-fund", "--no-update-notifier"]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=True, timeout=100
    ).stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the packed client. It is installed without a network, so it has no dependencies."""
    directory = tmp_path_factory.mktemp("typescript")
    source = copied(directory / "source")
    (packed,) = json.loads(npm("pack", "--json", cwd=source))
    files = {item["path"] for item in packed["files"]}
    modules = {f"dist/{path.stem}{kind}" for path in (PACKAGE / "src").iterdir() for kind in (".js", ".d.ts")}
    assert files == {"package.json", "README.md", *modules}
    made = directory / "project"
    made.mkdir()
    (made / "package.json").write_text('{"private": true, "type": "module"}')
    npm("install", "--offline", str(source / packed["filename"]), cwd=made)
    assert [item.name for item in (made / "node_modules").iterdir() if item.is_dir()] == ["profiles-client"]
    for name in ("@types", "undici-types"):
        (made / "node_modules" / name).symlink_to(node_modules() / name)
    return made


def test_features_of_the_package_are_those_of_the_registry() -> None:
    written = (PACKAGE / "src" / "features.ts").read_text()
    assert written == typescript(REGISTRY, ProfileFeatures)
    served = typescript(compile_registry(SERVED), ProfileFeatures)  # a feature may have been added to it
    assert set(written.splitlines()) <= set(served.splitlines())


@pytest.mark.asyncio(loop_scope="session")
async def test_client_keeps_its_promises(project: Path, site: Live, keyed: Live) -> None:
    shutil.copy(PINNED / "client.test.mts", project)
    node(TSC, *STRICT, *NODE_TARGET, "client.test.mts", cwd=project)
    # A zone behind UTC by half an hour too much for a mistake to go unnoticed.
    environment = {"URL": site.url, "KEYED": keyed.url, "KEY": KEYS["reader"], "TZ": "America/St_Johns"}
    said = await asyncio.to_thread(node, "client.test.mjs", cwd=project, **environment)
    assert "# fail 0" in said
    assert "# skipped 0" in said


def test_package_compiles_for_browsers(project: Path) -> None:
    page = 'import { Profiles } from "profiles-client";\nexport const client = new Profiles(location.origin);\n'
    (project / "page.ts").write_text(page)
    options = ("--module", "esnext", "--moduleResolution", "bundler", "--target", "es2022", "--lib", "es2022,dom")
    node(TSC, *STRICT, *options, "page.ts", cwd=project)
    for path in (project / "node_modules" / "profiles-client" / "dist").glob("*.js"):
        assert "node:" not in path.read_text()


def test_readme_leads_to_a_program_that_works(tmp_path: Path) -> None:
    node_modules()
    reader = Reader(tmp_path)
    copied(tmp_path / "typescript")
    install, *rest = blocks_of(PACKAGE / "README.md")
    reader.follow([install])
    with reader.up():
        printed = reader.follow(rest)
        volume = reader.get("/profiles/ada")["features"]["tip_volume_30d"]
    assert "tip-" in printed
    assert volume == 2
