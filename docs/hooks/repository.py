"""What the site shows of the repository outside docs/: pictures, the changelog, the benchmarks.

Links are written as a code host reads them, from the file where it lies (`../figures/scores.png`);
here they become links between pages. A bare `docs/method.md`, as docstrings have it, becomes a link
too.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[2]
PICTURES = ("figures/*.png", "benchmarks/*.png")
PAGES = {"CHANGELOG.md": "changelog.md", "benchmarks/README.md": "how_fast.md"}
"""Files of the repository that are pages of the site, and where."""

_SOURCES = {page: source for source, page in PAGES.items()}
_LINK = re.compile(r"\]\((?!\w+:|/)([^)\s#]+\.\w+)(#[^)\s]*)?\)")
_TAG = re.compile(r"(<[^>]*>)")
_MENTION = re.compile(r"\bdocs/(\w+\.md)\b")


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside docs/."""
    for pattern in PICTURES:
        for path in sorted(ROOT.glob(pattern)):
            place = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, place, abs_src_path=str(path)))
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links from a file of the repository to another -> links between pages."""
    here = page.file.src_uri

    def between_pages(match: re.Match[str]) -> str:
        folder = posixpath.dirname(_SOURCES.get(here, f"docs/{here}"))
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        there = PAGES.get(target, target.removeprefix("docs/"))
        return f"]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{match[2] or ''})"

    return _LINK.sub(between_pages, markdown)


def on_page_content(html: str, page: Page, files: Files, **_: Any) -> str:
    """Link every bare mention of a page of docs/."""

    def linked(match: re.Match[str]) -> str:
        file = files.get_file_from_path(match[1])
        if file is None:
            return match[0]
        return f'<a href="{get_relative_url(file.url, page.url)}">{match[0]}</a>'

    parts, inside = _TAG.split(html), False
    for i, part in enumerate(parts):
        if part.startswith("<"):
            inside = (inside or part.startswith("<a ")) and part != "</a>"
        elif not inside:
            parts[i] = _MENTION.sub(linked, part)
    return "".join(parts)
