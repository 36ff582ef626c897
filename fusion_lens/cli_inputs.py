"""What the options of commands name -> models, questions, judges: what has to be opened, and
checked, before anything runs.

Heavy packages are imported inside the functions, so that `--help` is quick.
"""

from __future__ import annotations

import re
import shlex
import sys
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from fusion_lens.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from fusion_lens.contrasts import Example
    from fusion_lens.judges import Judge
    from fusion_lens.models import HookedModel
    from fusion_lens.questions import Question
    from fusion_lens.recipes import Recipe

_SIMPLEQA = "basicv8vc/SimpleQA"


def segments_of(text: str) -> str | int:
    """A number of even segments, or the name of a division."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text


def _price(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    match [float(part) for part in re.findall(r"[0-9]+(?:\.[0-9]+)?", text)]:
        case [paid_in, paid_out] if re.fullmatch(r"[0-9.]+,[0-9.]+", text):
            return paid_in, paid_out
    raise ConfigError(f"judge_price must be two numbers as 2.5,10, but got {text!r}.")


def open_judge(name: str, cache: Path | None, grade: bool, price: str | None) -> Judge:
    """The judge of that name, ready to be asked.

    Raises:
        ConfigError: if it cannot be had as asked for.
    """
    from fusion_lens.judges import LexicalJudge

    if name == "lexical":
        if cache is not None or price is not None:
            raise ConfigError(
                "judge_cache and judge_price need a judge model, but the judge is lexical."
            )
        return LexicalJudge()
    from fusion_lens.llm_judge import LLMJudge

    judge = LLMJudge(name, grade=grade, cache=cache, price=_price(price))
    judge.open()
    return judge


def open_questions(source: str | None, model: str | None) -> list[Question]:
    """The questions of a file, of the hub, or Atlas' own.

    Raises:
        ConfigError: if a model other than Atlas comes without questions.
        InputFileError: if the file cannot be read or is malformed.
    """
    from fusion_lens.atlas import QUESTIONS
    from fusion_lens.hub import find_table
    from fusion_lens.questions import load_questions

    if source is None and model is not None:
        raise ConfigError(
            "a model other than Atlas needs questions of its own; give --questions FILE."
        )
    if source == "simpleqa" and not Path(source).exists():
        return load_questions(find_table(_SIMPLEQA))
    return load_questions(QUESTIONS if source is None else source)


def open_contrasts(source: str | None, model: str | None) -> list[Example]:
    """A file of contrasts, or one of Atlas' sets by its name.

    Raises:
        ConfigError: if a model other than Atlas comes without a file.
        InputFileError: if the file cannot be read or is malformed.
    """
    from fusion_lens.atlas import CONTRASTS
    from fusion_lens.contrasts import load_contrasts

    if source is None and model is not None:
        raise ConfigError(
            "a model other than Atlas needs contrasts of its own; give --contrasts FILE."
        )
    if source in (None, "sources", "context") and not Path(str(source)).is_file():
        return load_contrasts(CONTRASTS / f"{source or 'sources'}.jsonl")
    return load_contrasts(str(source))


def whole_numbers(name: str, text: str) -> tuple[int, ...]:
    """A list such as 1,10,100.

    Raises:
        ConfigError: if it is none.
    """
    if not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", text):
        raise ConfigError(f"{name} must be whole numbers as 1,10,100, but got {text!r}.")
    return tuple(int(part) for part in text.split(","))


def decimals(name: str, text: str) -> tuple[float, ...]:
    """A list such as 0.25,0.5,1.

    Raises:
        ConfigError: if it is none.
    """
    number = r"[0-9]{1,9}(\.[0-9]{1,9})?"
    if not re.fullmatch(f"{number}(,{number})*", text):
        raise ConfigError(f"{name} must be numbers as 0.25,0.5,1, but got {text!r}.")
    return tuple(float(part) for part in text.split(","))


def open_model(recipe: Recipe) -> HookedModel:
    """The model of a recipe."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    return recipe.opened()


def dictionary_names(given: list[str] | None, model: str | None) -> list[str]:
    """The dictionaries to be opened; those of Atlas where nothing is said."""
    if given is None:
        return ["atlas-crosscoder"] if model is None else []
    return [] if given == ["none"] else given


def typed_command() -> str:
    """What was typed but for the storage, whose URL may hold a password anywhere."""
    words = [Path(sys.argv[0]).name]
    for before, word in pairwise(sys.argv):
        option, equals, _ = word.partition("=")
        if before == "--storage":
            words.append("...")
        elif option == "--storage" and equals:
            words.append("--storage=...")
        else:
            words.append(word)
    return shlex.join(words)


def resuming_command() -> str:
    """What to type to go on with the run that was typed."""
    words = [word for word in typed_command().split(" ") if word not in ("--overwrite", "--resume")]
    return " ".join([*words, "--resume"])


def require_writable(path: Path) -> None:
    """Make sure that a file can be written, before anything that takes time.

    Raises:
        OutputError: if it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise OutputError(path, error.strerror or str(error)) from error
