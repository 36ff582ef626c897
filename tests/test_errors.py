from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from fusion_lens import errors
from fusion_lens.errors import (
    ConfigError,
    ContextLengthError,
    FusionLensError,
    HookNameError,
    InputFileError,
    MissingExtraError,
    OutputError,
    QuestionError,
    UnfitModelError,
    one_of,
    require_text,
)

REFINED = {
    "ActivationError": ValueError,
    "ConfigError": ValueError,
    "ContextLengthError": ValueError,
    "DeviceError": RuntimeError,
    "ContrastError": ValueError,
    "DictionaryError": ValueError,
    "HookNameError": LookupError,
    "InputFileError": ValueError,
    "MissingExtraError": ImportError,
    "ModelError": ValueError,
    "OutputError": OSError,
    "PlanError": ValueError,
    "QuestionError": ValueError,
    "ResumeError": ValueError,
    "SearchError": ValueError,
    "SpanError": ValueError,
    "UnfitModelError": ValueError,
}


def test_every_exception_has_the_one_root_and_the_builtin_it_refines() -> None:
    found = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and value is not FusionLensError
    }
    assert found.keys() == REFINED.keys()
    for name, value in found.items():
        assert value.__bases__ == (FusionLensError, REFINED[name])


def test_every_exception_is_the_same_after_a_way_between_processes() -> None:
    for error in (
        InputFileError("q.jsonl", "must be JSON", 3),
        ContextLengthError(100, 20, 110, limit="the run's cache"),
        OutputError("run", "it is full"),
        MissingExtraError("ray", "ray"),
        HookNameError("blocks.0.hook", ["blocks.0.hook_in"]),
        ConfigError("no"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))
        assert vars(again) == vars(error)


def test_a_fault_in_a_file_names_file_and_line() -> None:
    error = InputFileError("q.jsonl", "must be JSON", 3)
    assert str(error) == "q.jsonl, line 3: must be JSON"
    assert (error.path, error.reason, error.line) == (Path("q.jsonl"), "must be JSON", 3)


def test_a_fault_of_a_whole_file_names_no_line() -> None:
    error = InputFileError(Path("runs") / "a", "must hold a run")
    assert str(error) == f"{Path('runs') / 'a'}: must hold a run"
    assert error.line is None


def test_a_context_that_is_too_short_is_told_in_tokens() -> None:
    error = ContextLengthError(100, 48, 128)
    assert str(error) == (
        "prompt + completion must fit the model's context, but got 100 + 48 > 128 tokens; "
        "shorten the prompt or lower max_new_tokens."
    )
    assert (error.prompt_length, error.max_new_tokens, error.n_ctx) == (100, 48, 128)


def test_a_mistyped_hook_is_answered_with_those_that_are_close() -> None:
    known = [f"blocks.{layer}.hook_resid_post" for layer in range(2)] + ["ln_final.hook_scale"]
    error = HookNameError("blocks.0.hook_resid_pots", known)
    assert error.close[0] == "blocks.0.hook_resid_post"
    assert "ln_final.hook_scale" not in error.close
    assert str(error) == (
        "the hook must exist on the model, but got 'blocks.0.hook_resid_pots'. "
        "Did you mean blocks.0.hook_resid_post, blocks.1.hook_resid_post?"
    )


def test_a_hook_like_no_other_gets_no_suggestion() -> None:
    error = HookNameError("zzz", iter(["blocks.0.hook_resid_post"]))
    assert error.close == ()
    assert str(error) == "the hook must exist on the model, but got 'zzz'."


def test_a_place_that_cannot_be_written_asks_for_another() -> None:
    error = OutputError("/proc/x", "Permission denied")
    assert str(error) == (
        "/proc/x must be writable, but got: Permission denied; choose another place."
    )
    assert (error.path, error.reason) == (Path("/proc/x"), "Permission denied")


def test_a_missing_package_names_the_command_that_installs_it() -> None:
    error = MissingExtraError("pandas", "pandas")
    assert str(error) == (
        "pandas is needed here and is not installed; run: pip install 'fusion-lens[pandas]'"
    )
    assert (error.package, error.extra) == ("pandas", "pandas")


def test_a_model_that_cannot_be_shared_is_told_with_what_to_do() -> None:
    error = UnfitModelError("its weights are quantised")
    assert str(error) == (
        "the lean executor must be able to share the model's module, but its weights are "
        'quantised; use executor="auto" or "hooks".'
    )
    assert error.reason == "its weights are quantised"


def test_a_name_that_is_allowed_is_given_back_and_another_lists_what_is() -> None:
    assert one_of("mean", "question", ("question", "sequence")) == "question"
    with pytest.raises(ConfigError) as caught:
        one_of("mean", "Question", ("question", "sequence"))
    assert str(caught.value) == "mean must be one of question, sequence, but got 'Question'."


def test_a_text_that_is_empty_or_white_space_is_refused_with_the_error_that_was_asked_for() -> None:
    require_text(QuestionError, "question 'a'", id="a", answer="0")
    for empty in ("", " \n"):
        with pytest.raises(QuestionError) as caught:
            require_text(QuestionError, "question 'a'", id="a", answer=empty, question="")
        assert str(caught.value) == (
            f"question 'a' must have a non-empty answer, but got {empty!r}."
        )
