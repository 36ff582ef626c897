from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prompts_of, strong_plan
from engine import mixed_rows, raising_above, written

from fusion_lens.activations import record
from fusion_lens.engine_log import EngineLog
from fusion_lens.executors import HookPoints, executor_of, lean_of
from fusion_lens.generation import GenerationConfig, generate
from fusion_lens.lean import Lean
from fusion_lens.likelihood import completion_nll
from fusion_lens.models import HookedModel, load_model
from fusion_lens.slots import slots_fit

OUT_OF_MEMORY = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4398046511104 bytes. Error code 12 (Cannot allocate memory)"
    ),
}


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch, tiny: HookedModel) -> Any:
    """Call it with a number of rows and an error: a larger batch raises it from now on. It gives
    the list that every batch's size is put into."""
    assert slots_fit(tiny, lean_of(tiny))
    real = {kind: kind.forward for kind in (Lean, HookPoints)}

    def set_limit(most_rows: int, error: Exception) -> list[int]:
        seen: list[int] = []
        for kind, forward in real.items():
            monkeypatch.setattr(kind, "forward", raising_above(forward, most_rows, error, seen))
        return seen

    return set_limit


def test_a_new_log_has_counted_nothing() -> None:
    expected = {"rows": {"lean": 0, "hooks": 0}, "reasons": [], "halvings": 0}
    assert EngineLog().to_dict() == expected


def test_a_reason_is_noted_once_and_no_reason_not_at_all() -> None:
    log = EngineLog()
    for reason in (None, "no module", "hooks", "no module"):
        log.fell_back(reason)
    assert log.reasons == ["no module", "hooks"]


def test_what_a_summary_gets_is_a_copy() -> None:
    log = EngineLog()
    summary = log.to_dict()
    log.rows["lean"] += 3
    log.fell_back("no module")
    assert summary == EngineLog().to_dict()
    assert log.to_dict() == {
        "rows": {"lean": 3, "hooks": 0},
        "reasons": ["no module"],
        "halvings": 0,
    }


@pytest.mark.parametrize("kind", OUT_OF_MEMORY)
def test_rows_are_halved_until_they_fit_and_stay_halved(kind: str) -> None:
    log, tried = EngineLog(), []

    def attempt(n_rows: int) -> str:
        tried.append(n_rows)
        assert len(tried) < 10
        if n_rows > 3:
            raise OUT_OF_MEMORY[kind]
        return f"{n_rows} rows"

    assert log.halving(13, attempt) == "3 rows"
    assert log.halving(8, attempt) == "2 rows"
    assert log.halving(1, attempt) == "1 rows"
    assert tried == [13, 6, 3, 2, 1]
    assert log.halvings == 2


def test_memory_that_does_not_suffice_for_one_row_is_the_callers_to_know() -> None:
    log, tried = EngineLog(), []

    def attempt(n_rows: int) -> None:
        tried.append(n_rows)
        assert len(tried) < 10
        raise OUT_OF_MEMORY["device"]

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        log.halving(4, attempt)
    assert tried == [4, 2, 1]
    assert log.halvings == 2


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), ValueError("no"), MemoryError]
)
def test_any_other_error_comes_through_at_once(error: Exception | type[Exception]) -> None:
    log, tried = EngineLog(), []

    def attempt(n_rows: int) -> None:
        tried.append(n_rows)
        raise error

    with pytest.raises(error if isinstance(error, type) else type(error)):
        log.halving(4, attempt)
    assert tried == [4]
    assert log.halvings == 0


@pytest.mark.parametrize(
    ("executor", "kind"), [("lean", "device"), ("lean", "cpu"), ("hooks", "cpu")]
)
def test_generation_halves_its_slots_and_writes_the_same(
    tiny: HookedModel, limit: Any, executor: str, kind: str
) -> None:
    rows = mixed_rows(tiny, strong_plan(tiny), 9)
    whole = written(tiny, rows, executor=executor, slots=8)
    seen = limit(3, OUT_OF_MEMORY[kind])
    log = EngineLog()
    halved = written(tiny, rows, log, executor=executor, slots=8)
    assert [c.tokens for c in halved] == [c.tokens for c in whole]
    assert log.halvings == 2
    assert log.rows[executor] == 9
    assert seen[0] > 3
    seen.clear()
    again = written(tiny, rows, log, executor=executor, slots=8)
    assert [c.tokens for c in again] == [c.tokens for c in whole]
    assert log.halvings == 2
    assert max(seen) == 2
    seen.clear()
    written(tiny, rows, executor=executor, slots=8)
    assert seen[0] > 3


def test_memory_that_ran_out_while_the_lean_module_was_tried_is_no_answer_for_ever(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = load_model(tiny_folder), load_model(tiny_folder)
    lean_of(second)

    def failing(self: Lean, *args: Any, **options: Any) -> None:
        raise OUT_OF_MEMORY["device"]

    with monkeypatch.context() as patch:
        patch.setattr(Lean, "forward", failing)
        with suppress(torch.OutOfMemoryError):
            executor_of(first)
        with suppress(torch.OutOfMemoryError):
            slots_fit(second, lean_of(second))
    assert executor_of(first)[1] is None
    assert slots_fit(second, lean_of(second))


def test_rows_that_were_written_before_memory_ran_out_are_not_written_again(
    tiny: HookedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = mixed_rows(tiny, strong_plan(tiny), 9)
    whole = written(tiny, rows, slots=4)
    real, calls = Lean.forward, []

    def failing_late(self: Lean, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 9 and len(tokens) > 2:
            raise OUT_OF_MEMORY["cpu"]
        return real(self, tokens, *args, **options)

    monkeypatch.setattr(Lean, "forward", failing_late)
    log = EngineLog()
    finished: list[int] = []
    config = GenerationConfig(max_new_tokens=4, stop_at_eos=False, slots=4)
    halved = generate(tiny, rows, config, log=log, progress=finished.append)
    assert [c.tokens for c in halved] == [c.tokens for c in whole]
    assert log.halvings == 1
    assert log.rows == {"lean": 9, "hooks": 0}
    assert finished == list(range(1, 10))


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_an_error_at_one_slot_and_an_error_of_another_kind_come_through_generation(
    tiny: HookedModel, limit: Any, executor: str
) -> None:
    rows = mixed_rows(tiny, strong_plan(tiny), 3)
    log = EngineLog()
    seen = limit(0, OUT_OF_MEMORY["device"])
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        written(tiny, rows, log, executor=executor, slots=4)
    assert log.halvings == 2
    assert seen[-1] == 1
    seen = limit(0, RuntimeError("shapes do not fit"))
    log = EngineLog()
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        written(tiny, rows, log, executor=executor, slots=4)
    assert log.halvings == 0
    assert len(seen) == 1


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_recording_halves_its_batches_and_pools_the_same(
    tiny: HookedModel, limit: Any, executor: str
) -> None:
    prompts = prompts_of(tiny) * 3
    whole = record(tiny, prompts, executor=executor)
    seen = limit(2, OUT_OF_MEMORY["cpu"])
    log = EngineLog()
    halved = record(tiny, prompts, batch_size=8, executor=executor, log=log)
    assert log.halvings == 2
    assert {8, 4, 2} == set(seen)
    for one, other in zip(halved, whole, strict=True):
        assert torch.allclose(one.mean, other.mean, atol=1e-5)
    seen.clear()
    record(tiny, prompts, batch_size=8, executor=executor, log=log)
    assert set(seen) == {2}
    limit(0, OUT_OF_MEMORY["cpu"])
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        record(tiny, prompts, batch_size=8, executor=executor, log=log)
    limit(0, RuntimeError("shapes do not fit"))
    log = EngineLog()
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        record(tiny, prompts, batch_size=8, executor=executor, log=log)
    assert log.halvings == 0


# the lean module reads prompts in batches half as large
@pytest.mark.parametrize(
    ("executor", "tried", "fitting"), [("lean", {4, 2, 1}, {2, 1}), ("hooks", {8, 4, 2}, {2})]
)
def test_scoring_halves_its_batches_and_gives_the_same(
    tiny: HookedModel, limit: Any, executor: str, tried: set[int], fitting: set[int]
) -> None:
    rows = mixed_rows(tiny, strong_plan(tiny), 9)
    texts = [
        (row.prompt, completion) for row, completion in zip(rows, written(tiny, rows), strict=True)
    ]
    whole = completion_nll(tiny, texts, executor=executor)
    seen = limit(2, OUT_OF_MEMORY["device"])
    log = EngineLog()
    halved = completion_nll(tiny, texts, batch_size=8, executor=executor, log=log)
    assert halved == pytest.approx(whole, abs=1e-5)
    assert log.halvings == 2
    assert tried == set(seen)
    seen.clear()
    completion_nll(tiny, texts, batch_size=8, executor=executor, log=log)
    assert set(seen) == fitting
    limit(0, OUT_OF_MEMORY["device"])
    with pytest.raises(torch.OutOfMemoryError):
        completion_nll(tiny, texts, batch_size=8, executor=executor, log=log)
    limit(0, RuntimeError("shapes do not fit"))
    log = EngineLog()
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        completion_nll(tiny, texts, batch_size=8, executor=executor, log=log)
    assert log.halvings == 0


def test_recording_and_scoring_note_why_hook_points_are_used(
    hooked_transformer: HookedModel,
) -> None:
    log = EngineLog()
    prompts = prompts_of(hooked_transformer)[:1]
    record(hooked_transformer, prompts, log=log)
    reason = "HookedTransformer has no Hugging Face module to share"
    assert log.to_dict() == {
        "rows": {"lean": 0, "hooks": 0},
        "reasons": [reason],
        "halvings": 0,
    }
    asked = EngineLog()
    record(hooked_transformer, prompts, executor="hooks", log=asked)
    assert asked.reasons == []
    scored = EngineLog()
    completion_nll(hooked_transformer, [], log=scored)
    assert scored.reasons == [reason]
