"""The code blocks of a Markdown page, run in their order in one folder.

`python` blocks share their names. Every line of a `sh` block is a `fusion-lens` command. A `text`
block is what the block before it printed. Other kinds are shown only; the `fusion-lens` commands of
`console` blocks are at least well-formed.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from typer.main import get_command

from fusion_lens import cli

ROOT = Path(__file__).parents[1]
_FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_DECIMAL = re.compile(r"[-+]?\d+\.\d+")

Call = Callable[[list[str]], str]
"""Arguments of `fusion-lens` -> what it printed."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block: where it begins, what it is, what it holds."""

    line: int
    kind: str
    code: str


def blocks_of(text: str) -> list[Block]:
    """Every fenced block of a page that names its kind."""
    return [
        Block(text.count("\n", 0, match.start()) + 1, match[1], match[2])
        for match in _FENCE.finditer(text)
    ]


def run_blocks(text: str, name: str, call: Call) -> Iterator[tuple[Block, str]]:
    """Run a page in the working directory: each block that was run, and what it printed."""
    names: dict[str, object] = {}
    printed = ""
    for block in blocks_of(text):
        match block.kind:
            case "python":
                # compiled where it stands, so that a traceback names the line of the page
                code = compile("\n" * block.line + block.code, name, "exec")
                with redirect_stdout(StringIO()) as out:
                    exec(code, names)
                printed = out.getvalue()
            case "sh":
                printed = "".join(call(arguments) for arguments in commands_of(block))
            case "text":
                assert same_but_for_rounding(printed, block.code), (name, block.line, printed)
                continue
            case "console":
                for arguments in commands_of(block, others=True):
                    parse(arguments)
                continue
            case _:
                continue
        yield block, printed


def commands_of(block: Block, *, others: bool = False) -> list[list[str]]:
    """The arguments of every `fusion-lens` line; with `others`, lines of other programs are left
    out."""
    lines = block.code.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    if others:
        commands = [command for command in commands if command[:1] == ["fusion-lens"]]
    assert all(command[0] == "fusion-lens" for command in commands), block
    return [command[1:] for command in commands]


def same_but_for_rounding(printed: str, shown: str) -> bool:
    """Whether two texts agree, decimal numbers to within 2 % or one in their last place."""
    if _DECIMAL.split(_stripped(printed)) != _DECIMAL.split(_stripped(shown)):
        return False
    pairs = zip(_DECIMAL.findall(printed), _DECIMAL.findall(shown), strict=True)
    return all(
        abs(float(a) - float(b)) <= max(0.02 * abs(float(b)), 1.01 * 0.1 ** len(b.split(".")[1]))
        for a, b in pairs
    )


def in_a_process(arguments: list[str]) -> str:
    """Run a command by itself, as a shell would."""
    done = subprocess.run(
        [sys.executable, "-m", "fusion_lens.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def in_this_process(arguments: list[str]) -> str:
    """Run a command here: seconds sooner, since the models' packages are there."""
    out, err, code = StringIO(), StringIO(), 0
    with patch.object(sys, "argv", ["fusion-lens", *arguments]):
        try:
            with redirect_stdout(out), redirect_stderr(err):
                cli.main()
        except SystemExit as stopped:
            code = stopped.code
    assert not code, (arguments, err.getvalue())
    return out.getvalue()


def parse(arguments: list[str]) -> None:
    """Make sure a command and its options exist; nothing is run."""
    get_command(cli.app).make_context("fusion-lens", list(arguments)).close()
    name, *rest = arguments
    get_command(cli.app).commands[name].make_context(name, rest).close()


def _stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
