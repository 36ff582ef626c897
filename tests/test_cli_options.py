from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fusion_lens import cli
from fusion_lens.cli_options import given, settings_of
from fusion_lens.decoding import GenerationConfig
from fusion_lens.errors import ConfigError
from fusion_lens.method_suite import METHODS
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
        if not isinstance(option.show_default, str):
            assert controlled[name] == paper[name], name
            continue
        values = worded.get(name, (shown(controlled[name]), shown(paper[name])))
        assert option.show_default.startswith(values[0])
        assert (f"paper: {values[1]}" in option.show_default) == (values[0] != values[1])
        told += 1
    assert told >= 10


def test_the_help_of_every_command_shows_every_default_that_is_told() -> None:
    told = 0
    for name, command in get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        shown_help = CliRunner(env={"COLUMNS": "400"}).invoke(cli.app, [name, "--help"]).output
        for option in command.params:
            if isinstance(getattr(option, "show_default", None), str):
                assert f"[default: ({option.show_default})]" in shown_help, (name, option.name)
                told += 1
            for part in (option.help or "").split():
                assert part in shown_help, (name, option.name)
    assert told >= 30


def test_the_methods_that_are_compared_by_default_are_all_there_are() -> None:
    option = next(
        each
        for each in inspect.signature(cli.compare_methods, eval_str=True).parameters.values()
        if each.name == "methods"
    ).annotation.__metadata__[0]
    assert option.show_default == ",".join(METHODS)


@pytest.mark.parametrize("command", [cli.run, cli.tune, cli.generate])
def test_other_defaults_are_those_of_the_configs(command: Any) -> None:
    controlled = flat(PROTOCOLS["controlled"])
    parameters = inspect.signature(command).parameters
    shared = {"segments", "centre", "executor", "chat", "max_new_tokens"} & parameters.keys()
    assert len(shared) >= 2
    for name in shared:
        assert parameters[name].default in (controlled[name], None)
