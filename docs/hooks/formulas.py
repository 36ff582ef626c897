"""TeX between dollar signs or in `math` blocks -> MathML, which browsers show without a script."""

from __future__ import annotations

import html as entities
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def on_page_content(html: str, **_: Any) -> str:
    """Convert every formula that arithmatex has marked."""
    return _FORMULA.sub(_mathml, html)


def _mathml(match: re.Match[str]) -> str:
    tex = entities.unescape(match["tex"]).strip()
    block = match["tag"] == "div"
    made = convert(tex, display="block" if block else "inline")
    if "\\" in made:  # a command the converter does not know is passed through as it is
        raise PluginError(f"every command of a formula must be known, but got {tex!r}.")
    return f'<div class="formula">{made}</div>' if block else made
