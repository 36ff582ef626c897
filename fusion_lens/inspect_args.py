"""What follows `-M` on inspect-ai's command line -> how a model is opened and how it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fusion_lens.decoding import GenerationConfig
from fusion_lens.errors import ConfigError, one_of
from fusion_lens.typed_json import typed


@dataclass(frozen=True, slots=True)
class ModelArgs:
    """What `-M` sets.

    `plan` is a plan's file, its coefficients multiplied by `scale`. `dtype`, `device`,
    `load_in_8bit`, `load_in_4bit` and `device_map` are those of `load_model`; `slots`,
    `cache_length` and `executor` those of `GenerationConfig`: with numbers for the first two, a
    reply does not depend on what shares its batch, to the last bit. `chat` is True, False, or
    "auto": by the chat template where the tokenizer has one. `batch_size` is the most requests of a
    batch, `window` the seconds it waits for another.

    Raises:
        ConfigError: if one is out of its range.
    """

    plan: str | None = None
    scale: float = 1.0
    dtype: str | None = None
    device: str | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    device_map: str | None = None
    chat: bool | str = "auto"
    slots: int | None = None
    cache_length: int | None = None
    executor: str = "auto"
    batch_size: int = 32
    window: float = 0.05

    def __post_init__(self) -> None:
        if isinstance(self.chat, str):
            one_of("chat", self.chat, ("auto",))
        if self.batch_size < 1 or self.window < 0.0:
            raise ConfigError(
                "batch_size must be at least 1 and window at least 0, but got "
                f"({self.batch_size=}, {self.window=})."
            )
        self.generation()

    def opening(self) -> dict[str, Any]:
        """How the model is opened."""
        named = ("dtype", "device", "load_in_8bit", "load_in_4bit", "device_map")
        return {name: getattr(self, name) for name in named}

    def generation(self) -> GenerationConfig:
        """How every reply is written."""
        return GenerationConfig(
            slots=self.slots, cache_length=self.cache_length, executor=self.executor
        )


def read_model_args(given: Mapping[str, Any]) -> ModelArgs:
    """The arguments as inspect-ai gives them, each checked.

    Raises:
        ConfigError: if one is not known, of another type, or out of its range.
    """
    told = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    try:
        return typed(ModelArgs, told)
    except (TypeError, ValueError) as error:
        known = ", ".join(field.name for field in fields(ModelArgs))
        raise ConfigError(
            f"a model argument of fusion_lens must be one of {known}, but: {error}."
        ) from error
