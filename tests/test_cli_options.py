from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from fusion_lens import cli
from fusion_lens.cli_options import given, settings_of
from fusion_lens.decoding import GenerationConfig
from fusion_lens.errors import ConfigError
from fusion_lens.protocols import PROTOCOLS


def flat(config: Any) -> dict[str, object]:
    """The settings of a protocol by name."""
    found: dict[str, object] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        found |= flat(value) if is_dataclass(value) else {field.name: value}
    return found


@pytest.mark.parametrize("name", PROTOCOLS)
def test_without_options_the_settings_are_the_protocols(name: str) -> None:
    assert settings_of(protocol=name) == PROTOCOLS[name]


def test_what_is_given_is_changed_and_nothing_else() -> None:
    made = settings_of(
        protocol="paper", trials=9, steer_special=False, chat=True, perplexity_model="folder"
    )
    before, after = flat(PROTOCOLS["paper"]), flat(made)
    assert {name: value for name, value in after.items() if value != before[name]} == {
        "trials": 9,
        "steer_special": False,
        "chat": True,
        "perplexity_model": "folder",
    }


def test_a_given_value_may_be_false_or_zero() -> None:
    assert given(GenerationConfig(), use_cache=False, temperature=0.0, slots=None) == (
        GenerationConfig(use_cache=False)
    )


def test_an_unknown_protocol_is_refused() -> None:
    with pytest.raises(ConfigError, match="protocol must be one of controlled, paper, but got"):
        settings_of(protocol="published")


def shown(value: object) -> str:
    names = {True: "yes", False: "no", None: "none"}
    if isinstance(value, tuple):
        return ",".join(value)
    return names[value] if isinstance(value, bool | None) else str(value)


@pytest.mark.parametrize("command", [cli.run, cli.tune])
def test_the_help_tells_the_defaults_of_both_protocols(command: Any) -> None:
    controlled, paper = (flat(PROTOCOLS[name]) for name in ("controlled", "paper"))
    worded = {
        "steer_special": ("spare", "steer"),
        "perplexity_model": ("the steered one, unsteered", paper["perplexity_model"]),
    }
    told = 0
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        if name not in controlled or parameter.default is not None:
            continue
        option = parameter.annotation.__metadata__[0]
        if "[default: " not in option.help:
            assert controlled[name] == paper[name], name
            continue
        values = worded.get(name, (shown(controlled[name]), shown(paper[name])))
        assert f"[default: {values[0]}" in option.help
        assert (f"paper: {values[1]}" in option.help) == (values[0] != values[1])
        told += 1
    assert told >= 10


@pytest.mark.parametrize("command", [cli.run, cli.tune, cli.generate])
def test_other_defaults_are_those_of_the_configs(command: Any) -> None:
    controlled = flat(PROTOCOLS["controlled"])
    parameters = inspect.signature(command).parameters
    shared = {"segments", "centre", "executor", "chat", "max_new_tokens"} & parameters.keys()
    assert len(shared) >= 2
    for name in shared:
        assert parameters[name].default in (controlled[name], None)
