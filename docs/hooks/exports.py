"""What `import fusion_lens` names -> a list with links, made from the package."""

from __future__ import annotations

import inspect
import re
from itertools import groupby
from pathlib import Path
from typing import Any

from mkdocs.structure.pages import Page

import fusion_lens

MARK = "<!-- exports -->"


def exports() -> dict[str, str]:
    """Every name the package exports, and the module that makes it."""
    stub = Path(fusion_lens.__file__).with_suffix(".pyi").read_text("utf-8")
    return {
        name: f"fusion_lens{module}"
        for module, name, alias in re.findall(r"^from (\S+) import (\w+) as (\w+)$", stub, re.M)
        if name == alias
    }


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in the list."""
    return markdown.replace(MARK, _listed()) if MARK in markdown else markdown


def _listed() -> str:
    lines = []
    for module, names in groupby(exports().items(), key=lambda item: item[1]):
        lines += ["", f"**[`{module.removeprefix('fusion_lens.')}`][{module}]**", ""]
        for name, _ in names:
            said = (inspect.getdoc(getattr(fusion_lens, name)) or "").split("\n\n")[0]
            lines.append(f"- [`{name}`][{module}.{name}]: {' '.join(said.split())}")
    return "\n".join(lines)
