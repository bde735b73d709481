"""Pictures of the pages in the READMEs, and the fingerprint by which a test finds one that is out of date.

A picture carries the fingerprint of its page in its PNG metadata (a `tEXt` chunk), so that it survives a clone, where
file times mean nothing. The fingerprint is a hash of the template, of the templates that it extends or imports, and of
the style sheets and scripts that these load. Comments do not count.
"""

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from typing import Literal, NamedTuple

from jinja2 import Environment, meta

from tests.support.processes import ROOT

PAGES = ROOT / "app/api/pages"
PICTURES = ROOT / "tests/browser/pictures"
SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = b"Page fingerprint\0"
_ASSET = re.compile(r"/admin/static/([\w.-]+)")
_COMMENT = re.compile(r"\{#.*?#\}|/\*.*?\*/|^\s*//[^\n]*$", re.DOTALL | re.MULTILINE)


class Picture(NamedTuple):
    """A picture in a README: the upper `height` pixels of a page."""

    template: str
    scheme: Literal["light", "dark"]
    height: int


# By file name and page of `tests.browser.screenshots`.
IN_READMES = {
    "overview": Picture("overview.html", "light", 1000),
    "user": Picture("user.html", "dark", 1150),
    "data-quality": Picture("data_quality.html", "light", 1150),
    "rollout": Picture("rollout.html", "light", 1010),
}


def fingerprint(template: str) -> str:
    """The fingerprint of the page that a template renders."""
    digest = hashlib.sha256()
    for name in sorted(sources(template)):
        text = _COMMENT.sub("", (PAGES / name).read_text())
        digest.update(f"{name}\n{' '.join(text.split())}\n".encode())
    return digest.hexdigest()[:16]


def sources(template: str) -> set[str]:
    """The files of a page, relative to `app/api/pages`."""
    found: set[str] = set()
    pending = [template]
    while pending:
        name = f"templates/{pending.pop()}"
        if name not in found:
            text = (PAGES / name).read_text()
            found |= {name, *(f"static/{asset}" for asset in _ASSET.findall(text))}
            pending += [str(other) for other in meta.find_referenced_templates(Environment().parse(text))]  # noqa: S701
    return found


def stamped(png: bytes, text: str) -> bytes:
    """The picture with this fingerprint in its metadata."""
    chunk = b"tEXt" + KEYWORD + text.encode()
    written = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    end = len(SIGNATURE) + 4 + 4 + 13 + 4  # IHDR comes first: its length, name, contents and checksum
    return png[:end] + written + png[end:]


def stamp_of(png: bytes) -> str | None:
    """The fingerprint in the metadata of a picture."""
    for kind, data in chunks(png):
        if kind == b"tEXt" and data.startswith(KEYWORD):
            return data.removeprefix(KEYWORD).decode()
    return None


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    place = len(SIGNATURE)
    while place < len(png):
        (length,) = struct.unpack_from(">I", png, place)
        yield png[place + 4 : place + 8], png[place + 8 : place + 8 + length]
        place += length + 12
