"""The commands of `fusion-lens` -> their arguments and options as tables, made from the program."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from mkdocs.structure.pages import Page
from typer.main import get_command

from fusion_lens.cli import app

MARK = "<!-- commands -->"
_KINDS = {int: "number", float: "decimal", Path: "path", str: "text", bool: "flag"}


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in the tables."""
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands() -> str:
    """Every command as Markdown."""
    named: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
    own = (each.callback for each in app.registered_commands if each.callback is not None)
    return "\n\n".join(
        _section(name, command, callback)
        for (name, command), callback in zip(named.items(), own, strict=True)
    )


def _section(name: str, command: Any, callback: Callable[..., Any]) -> str:
    kinds = _kinds(callback)
    arguments, options = [], []
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        shown = parameter.name.upper() if argument else _spelt(parameter)
        row = f"| `{shown}` {kinds[parameter.name]} | {_told(parameter)} |"
        (arguments if argument else options).append(row)
    usage = ["fusion-lens", name, *(row.split("`")[1] for row in arguments)]
    parts = [f"## {name}", " ".join(command.help.split())]
    parts.append(f"```console\n{' '.join(usage + ['[OPTIONS]'] * bool(options))}\n```")
    for kind, rows in (("argument", arguments), ("option", options)):
        if rows:
            parts.append("\n".join([f"| {kind} | |", "| --- | --- |", *rows]))
    return "\n\n".join(parts)


def _kinds(callback: Callable[..., Any]) -> dict[str, str]:
    """What each parameter takes, by the annotation of the function."""
    kinds = {}
    for name, parameter in inspect.signature(callback, eval_str=True).parameters.items():
        annotated = get_args(parameter.annotation)[0]
        kind = next((part for part in get_args(annotated) if part is not type(None)), annotated)
        several = get_args(kind)
        kinds[name] = f"{_KINDS[several[0]]}, repeatable" if several else _KINDS[kind]
    return kinds


def _spelt(parameter: Any) -> str:
    return "` / `".join((*parameter.opts, *parameter.secondary_opts))


def _told(parameter: Any) -> str:
    """What the help says, and the default."""
    text, default = parameter.help or "", ""
    if isinstance(parameter.show_default, str):
        # it depends on the protocol
        default = _cell(parameter.show_default)
    elif parameter.required:
        text = f"{text} Required."
    elif parameter.default is False and parameter.secondary_opts:
        default = f"`{parameter.secondary_opts[0]}`"
    elif parameter.default is not None and parameter.default is not False:
        default = f"`{parameter.default}`"
    return f"{_cell(text)} *Default:* {default}." if default else _cell(text)


def _cell(text: str) -> str:
    # bars, stars, underscores and brackets are meant as they are written; lists may be broken
    return re.sub(r"([|*_<>\[\]])", r"\\\1", re.sub(r",(?=[a-z])", ", ", text))
