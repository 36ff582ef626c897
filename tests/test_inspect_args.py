from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fusion_lens.errors import ConfigError
from fusion_lens.inspect_args import ModelArgs, read_model_args


def test_arguments_have_names_and_types() -> None:
    told = {"plan": Path("plan.safetensors"), "scale": 2, "slots": 8, "chat": False}
    assert read_model_args(told) == ModelArgs("plan.safetensors", 2.0, slots=8, chat=False)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"plans": "a"}, r"must be one of plan, scale, .*window, but: plans is no known field"),
        ({"trust_remote_code": True}, r"trust_remote_code is no known field"),
        ({"scale": "much"}, r"scale must be a valid number, but got 'much'"),
        ({"slots": 0}, r"slots must be at least 1, but got 0"),
        ({"chat": "maybe"}, r"chat must be one of auto, but got 'maybe'"),
        ({"executor": "fast"}, r"executor must be one of auto, lean, hooks, but got 'fast'"),
        ({"batch_size": 0}, r"batch_size must be at least 1 and window at least 0, but got"),
        ({"plan": object()}, r"not JSON serializable"),
    ]
    for given, message in wrong:
        with pytest.raises(ConfigError, match=message):
            read_model_args(given)


def test_a_model_is_opened_as_the_arguments_say() -> None:
    args = read_model_args({"dtype": "bfloat16", "load_in_4bit": True, "slots": 8})
    assert args.opening() == {
        "dtype": "bfloat16",
        "device": None,
        "load_in_8bit": False,
        "load_in_4bit": True,
        "device_map": None,
    }
    assert (args.generation().slots, args.generation().cache_length) == (8, None)
