"""No picture in a README is older than the template, style sheets and scripts of its page."""

import re

import pytest

from tests.support.pictures import IN_READMES, PICTURES, fingerprint, sources, stamp_of, stamped
from tests.support.readme import READMES

RETAKE = "The page has changed since its picture was taken. Restart `make up`; then run make screenshots ARGS=--readme"


@pytest.mark.parametrize("name", IN_READMES)
def test_picture_is_as_new_as_its_page(name: str) -> None:
    stamp = stamp_of((PICTURES / f"{name}.png").read_bytes())
    assert stamp == fingerprint(IN_READMES[name].template), RETAKE


def test_every_picture_of_a_readme_is_checked() -> None:
    shown = {
        (path.parent / target).resolve()
        for path in READMES
        for target in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", path.read_text())
    }
    assert shown == {(PICTURES / f"{name}.png").resolve() for name in IN_READMES}
    assert set(PICTURES.glob("*.png")) == {PICTURES / f"{name}.png" for name in IN_READMES}


def test_sources_of_a_page_include_those_of_its_template() -> None:
    assert sources("user.html") == {
        *(
            f"templates/{name}.html"
            for name in ("user", "charts", "layout", "macros", "user_macros", "decision_macros")
        ),
        *("static/pages.css", "static/pages.js", "static/user.css", "static/decisions.css"),
    }


def test_fingerprint_can_be_read_from_the_metadata() -> None:
    plain = (PICTURES / "overview.png").read_bytes()
    assert stamp_of(stamped(plain.replace(b"tEXt", b"zTXt"), "0123abcd")) == "0123abcd"
