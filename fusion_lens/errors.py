"""Every exception of the package.

Each message says what must hold, what was got and what to do. Each class also derives from the
builtin it refines and carries the data a caller may want to branch on. Knows nothing of models or
tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any


class FusionLensError(Exception):
    """The root of the package's exceptions. Each is the same after a way between processes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _made_again, (type(self), self.args, self.__dict__)


class InputFileError(FusionLensError, ValueError):
    """A file the user gave cannot be used; `line` is 1-based where the fault has one."""

    def __init__(self, path: str | Path, reason: str, line: int | None = None) -> None:
        self.path = Path(path)
        self.reason = reason
        self.line = line
        place = f"{path}" if line is None else f"{path}, line {line}"
        super().__init__(f"{place}: {reason}")


class QuestionError(FusionLensError, ValueError):
    """A question lacks something that every question must have."""


class ContrastError(FusionLensError, ValueError):
    """A pair or example lacks something, or a set of them is not fit to be learned from."""


class SpanError(FusionLensError, ValueError):
    """The tokens of an answer cannot be found in a text."""


class DeviceError(FusionLensError, RuntimeError):
    """A device is in a state in which no work on it succeeds."""


class ContextLengthError(FusionLensError, ValueError):
    """Prompt and completion do not fit the model's context, or the `limit` set to them."""

    def __init__(
        self,
        prompt_length: int,
        max_new_tokens: int,
        n_ctx: int,
        *,
        limit: str = "the model's context",
    ) -> None:
        self.prompt_length = prompt_length
        self.max_new_tokens = max_new_tokens
        self.n_ctx = n_ctx
        super().__init__(
            f"prompt + completion must fit {limit}, but got "
            f"{prompt_length} + {max_new_tokens} > {n_ctx} tokens; "
            "shorten the prompt or lower max_new_tokens."
        )


class ModelError(FusionLensError, ValueError):
    """A model cannot be opened or does not offer what is needed."""


class UnfitModelError(FusionLensError, ValueError):
    """A model that only its hook points can run; `reason` tells why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"the lean executor must be able to share the model's module, but {reason}; "
            'use executor="auto" or "hooks".'
        )


class HookNameError(FusionLensError, LookupError):
    """A hook name the model does not have. TransformerBridge would run on, unsteered."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.close = tuple(get_close_matches(name, list(known), n=3))
        hint = f" Did you mean {', '.join(self.close)}?" if self.close else ""
        super().__init__(f"the hook must exist on the model, but got {name!r}.{hint}")


class ActivationError(FusionLensError, ValueError):
    """Recorded activations are not finite or do not fit together."""


class PlanError(FusionLensError, ValueError):
    """A plan is malformed, or does not belong to the model it is used on."""


class DictionaryError(FusionLensError, ValueError):
    """A sparse dictionary cannot be opened, or does not belong to what it is used on."""


class SearchError(FusionLensError, ValueError):
    """A search that cannot be run as configured."""


class ConfigError(FusionLensError, ValueError):
    """A setting outside its range or a name that is not known."""


class ResumeError(FusionLensError, ValueError):
    """A run that cannot be continued as what it was."""


class OutputError(FusionLensError, OSError):
    """A file or folder that cannot be written."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path = Path(path)
        self.reason = reason
        super().__init__(f"{path} must be writable, but got: {reason}; choose another place.")


class MissingExtraError(FusionLensError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"{package} is needed here and is not installed; "
            f"run: pip install 'fusion-lens[{extra}]'"
        )


def _made_again(
    kind: type[FusionLensError], args: tuple[Any, ...], state: dict[str, Any]
) -> FusionLensError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


def require_text(kind: type[FusionLensError], what: str, /, **values: str) -> None:
    """Refuse values that are empty or white space; they are named as they are passed.

    Raises:
        FusionLensError: of that `kind`, if one is; the message begins with `what`.
    """
    for name, value in values.items():
        if not value.strip():
            raise kind(f"{what} must have a non-empty {name}, but got {value!r}.")


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """Return `value` if it is allowed.

    Raises:
        ConfigError: if it is not; the message lists what is.
    """
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, but got {value!r}.")
    return value
