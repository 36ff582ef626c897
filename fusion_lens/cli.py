"""`fusion-lens`: arguments in, exit code out.

Exit codes: 0 done; 1 bad input or a bad file (one line on stderr says what must hold); 2 a
malformed command line; 3 the run ended but some questions failed (listed); 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from fusion_lens.commands.comparing import compare_methods
from fusion_lens.commands.exporting import export, import_vectors
from fusion_lens.commands.features import features
from fusion_lens.commands.questions import questions
from fusion_lens.commands.running import compare, report, run
from fusion_lens.commands.suggesting import suggest
from fusion_lens.commands.tuning import generate, tune
from fusion_lens.errors import FusionLensError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prompt-specific activation steering at every layer: record, inject, tune, evaluate.",
)
for command in (
    *(run, report, compare, tune, suggest, generate, features, questions),
    *(compare_methods, export),
):
    app.command()(command)
app.command("import")(import_vectors)


def _say_version(asked: bool) -> bool:
    if asked:
        print(f"fusion-lens {version('fusion-lens')}")
        raise typer.Exit
    return asked


@app.callback()
def _everywhere(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Say the version."),
    ] = False,
) -> None:
    pass


# typer has a copy of click of its own or uses the installed one, depending on its version
_ClickException: Any = next(
    kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException"
)


def main() -> None:
    """The entry point: every expected error is one line."""
    try:
        code = app(standalone_mode=False)
    except FusionLensError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 1
    except _ClickException as error:
        if error.format_message():
            print(f"error: {error.format_message()}", file=sys.stderr)
        code = error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
