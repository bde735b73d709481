"""The READMEs are true: every setting, metric and feature is named, and every code block runs."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from app.settings import Settings
from app.stores.postgres.database import WRITERS
from app.stores.sql.database import SPARE_READERS
from tests.bench.__main__ import MEASUREMENTS
from tests.support.metrics import metric_names
from tests.support.processes import ROOT
from tests.support.readme import HEADING, LANGUAGES, READMES, Reader, blocks_of, sections
from tests.support.registry import REGISTRY
from tests.support.waiting import eventually_sync

FRONT = (ROOT / "README.md").read_text()
README = "\n".join(path.read_text() for path in READMES)
BLOCKS = [block for path in READMES for block in blocks_of(path)]
QUEUE = "app/events/README.md: Publishing on the queue"
TRAINING = "app/cli/README.md: Training sets"
# Followed by `test_readme_walk.py` and `test_added_input.py`, which start services of their own, by
# `features/test_actions.py`, by `tests/integration/cli/test_evaluate.py`, by `tests/browser/test_behind_proxy.py`, by
# `tests/integration/stores/postgres/test_diagnostics.py`, and by `tests/integration/clients/test_typescript.py`.
ELSEWHERE = {
    "app/clients/typescript/README.md: From nothing to a decision",
    "app/clients/typescript/README.md: Types",
    "README.md: Adding a feature",
    "app/bandit/README.md: Adding a feedback action",
    "app/bandit/README.md: Evaluating a policy",
    "app/bandit/README.md: Adding an input",
    "docker/README.md: Behind a proxy",
    "docker/README.md: PostgreSQL",
}
SECTIONS = {name: blocks for name, blocks in sections().items() if name not in {QUEUE, TRAINING, *ELSEWHERE}}


def test_readme_describes_every_setting_with_its_default() -> None:
    for item in fields(Settings):
        default = int(item.default) if isinstance(item.default, bool) else item.default
        shown = "" if default in (None, (), "") else f"`{default}`"
        row = f"| `PROFILES_{item.name.upper()}` | {shown} | "
        described = rf"^{re.escape(row)}\S.*\. \|$"
        assert re.search(described, README, re.MULTILINE), f"docker/README.md needs a sentence in the row {row}"


@pytest.mark.parametrize("path", READMES, ids=[str(path.relative_to(ROOT)) for path in READMES])
def test_readme_names_only_settings(path: Path) -> None:
    known = {f"PROFILES_{item.name.upper()}" for item in fields(Settings)}
    assert {name.removesuffix("_FILE") for name in re.findall(r"PROFILES_[A-Z_]+[A-Z]", path.read_text())} <= known


def test_readme_names_every_metric() -> None:
    for name in metric_names():
        if name.startswith("process_"):  # of Prometheus' client, which explains them
            continue
        assert f"`{name}`" in README, f"{name} is not explained"


def test_queries_of_the_readme_name_metrics_that_exist() -> None:
    queried = set(re.findall(r"^ {4}.*?(profiles_[a-z_]+)\{", README, re.MULTILINE))
    assert queried
    assert queried <= metric_names()


def test_readme_shows_every_feature_as_it_is_registered() -> None:
    for entry in REGISTRY:
        default = "null" if entry.default is None else entry.default
        assert re.search(rf"^\| `{entry.name}` \| {entry.dtype} \|.*\| {default} \|", README, re.MULTILINE)


def test_readme_lists_every_benchmark() -> None:
    table = re.search(r"^\| name \| what it measures \|$(?:\n\|.*$)+", README, re.MULTILINE)
    assert table is not None
    first = [row.split("|")[1] for row in table[0].splitlines()[2:]]
    assert set(re.findall(r"`([a-z-]+)`", "".join(first))) == set(MEASUREMENTS)


def test_readme_counts_the_connections_of_a_process() -> None:
    assert f"up to `PROFILES_READERS` + {SPARE_READERS + WRITERS + 1}." in README


@pytest.mark.parametrize("path", READMES, ids=[str(path.relative_to(ROOT)) for path in READMES])
def test_links_lead_to_headings_that_exist(path: Path) -> None:
    for link, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", path.read_text()):
        target = (path.parent / link).resolve() if link else path
        assert target.exists(), link
        if anchor:
            headings = [
                re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in HEADING.findall(target.read_text())
            ]
            assert anchor in headings, f"{link}#{anchor}"


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"`make ([a-z]+)`", README)) | set(re.findall(r"^make ([a-z]+)$", README, re.MULTILINE))
    assert {"up", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE), f"make {target} does not exist"


def test_two_commands_are_what_ci_runs() -> None:
    assert [block.code for block in BLOCKS if block.by_ci][:2] == ["make up\n", "make test\n"]
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()


def test_every_code_block_is_in_a_language_that_is_tested() -> None:
    for block in BLOCKS:
        place = f"{block.path.relative_to(ROOT)}:{block.line}"
        assert block.language in LANGUAGES, f"{place}: {block.language or 'no language'}"
    fences = sum(text.count("```") for text in (path.read_text() for path in READMES))
    assert fences == 2 * len(BLOCKS), "a code block is not closed"
    run = [block for blocks in sections().values() for block in blocks]
    assert run == [block for block in BLOCKS if not block.by_ci], "two sections of a file have the same heading"


def test_front_page_stays_short() -> None:
    assert len(FRONT.splitlines()) <= 180


def test_adding_a_feature_stays_short() -> None:
    (section,) = re.findall(r"^### Adding a feature\n.*?(?=^##)", FRONT, re.MULTILINE | re.DOTALL)
    assert len(section.splitlines()) < 40


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    assert shutil.which("curl"), "the README's commands need curl"
    reader = Reader(tmp_path_factory.mktemp("up"))
    with reader.up():
        yield reader


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_code_of_a_section_runs(section: str, reader: Reader) -> None:
    reader.follow(SECTIONS[section])


@pytest.mark.slow
def test_event_arrives_when_published_as_the_readme_does(reader: Reader) -> None:
    reader.follow(sections()[QUEUE])
    eventually_sync(lambda: reader.get("/profiles/grace")["features"]["tip_volume_30d"] == 1)


@pytest.mark.slow
def test_label_leaks_as_the_readme_says(reader: Reader) -> None:
    printed = reader.follow(sections()[TRAINING])
    assert re.findall(r"^linus,.*Z,1,(.*)$", printed, re.MULTILINE) == ["1.0", ""]
    assert "1 rows written to training.parquet\n" in printed
