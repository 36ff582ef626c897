from __future__ import annotations

import pytest
import torch
from conftest import deltas_of, prompts_of, strong_plan
from kinds import SITES, by_hand, every_plan

from fusion_lens.decoding import Completion, Row
from fusion_lens.errors import PlanError, SpanError
from fusion_lens.hooks import fwd_hooks, steering
from fusion_lens.models import HookedModel, load_model, resid_post
from fusion_lens.plans import Plan, make_plan
from fusion_lens.prompts import tokenize
from fusion_lens.teacher_forcing import Text, log_probs, record_streams, token_log_probs

WRITTEN = (40, 41, 42, 43, 44)


@pytest.fixture(params=["lean", "hooks"])
def executor(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def residuals(model: HookedModel, text: Text) -> torch.Tensor:
    """By TransformerLens' own cache, one row without padding."""
    tokens = torch.tensor([text.tokens])
    hooks = [] if text.plan is None else fwd_hooks(text.plan, prompt=text.prompt)
    with model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(tokens)
    return torch.stack([cache[resid_post(layer)][0] for layer in range(4)])


def test_streams_are_those_of_a_single_cached_run(tiny: HookedModel, executor: str) -> None:
    plans = [None, strong_plan(tiny), strong_plan(tiny, 0.5)]
    texts = [
        Text(prompt, WRITTEN[: n + 1], plan)
        for n, (prompt, plan) in enumerate(zip(prompts_of(tiny), plans, strict=True))
    ]
    for text, streams in zip(texts, record_streams(tiny, texts, executor=executor), strict=True):
        expected = residuals(tiny, text)
        assert streams.leaving.shape == (4, len(text.tokens), 32)
        assert torch.allclose(streams.leaving, expected, atol=5e-5, rtol=1e-4)


def test_between_entering_and_leaving_lies_the_shift_and_nothing_else(
    tiny: HookedModel, executor: str
) -> None:
    plan = strong_plan(tiny, positions="completion")
    prompt = prompts_of(tiny)[0]
    (streams,) = record_streams(tiny, [Text(prompt, WRITTEN, plan)], executor=executor)
    last = len(prompt.tokens) - 1
    assert torch.equal(streams.entering[:, :last], streams.leaving[:, :last])
    shift = plan.steps[0].shift[:, None]
    assert torch.equal(streams.entering[:, last:] + shift, streams.leaving[:, last:])


def test_a_plan_below_moves_what_enters_above(tiny: HookedModel) -> None:
    plan = make_plan(deltas_of(tiny), 40.0, (make_plan(deltas_of(tiny), 1.0).steps[0].segments))
    prompt = prompts_of(tiny)[0]
    steered, plain = record_streams(tiny, [Text(prompt, WRITTEN, plan), Text(prompt, WRITTEN)])
    assert torch.allclose(steered.entering[0], plain.entering[0], atol=1e-6)
    assert (steered.entering[1] - plain.entering[1]).norm() > 1.0


def test_a_texts_numbers_do_not_depend_on_the_others(tiny: HookedModel, executor: str) -> None:
    plan = strong_plan(tiny)
    texts = [
        Text(prompt, WRITTEN[:n], chosen)
        for prompt in prompts_of(tiny)
        for n in (1, 3, 5)
        for chosen in (None, plan)
    ]
    together = record_streams(tiny, texts, executor=executor)
    values = log_probs(tiny, texts, executor=executor)
    for i in (0, 7, 17):
        (alone,) = record_streams(tiny, [texts[i]], executor=executor)
        assert torch.equal(alone.leaving, together[i].leaving)
        assert log_probs(tiny, [texts[i]], executor=executor) == [values[i]]


def test_log_probs_are_sums_of_log_softmax_under_the_plan(tiny: HookedModel, executor: str) -> None:
    plan = strong_plan(tiny)
    prompt = prompts_of(tiny)[2]
    values = log_probs(
        tiny, [Text(prompt, WRITTEN, plan), Text(prompt, WRITTEN)], executor=executor
    )
    tokens = torch.tensor([prompt.tokens + WRITTEN])
    own = slice(len(prompt.tokens) - 1, -1)
    with torch.no_grad(), steering(tiny, plan, prompt=prompt):
        steered = tiny(tokens)[0, own].log_softmax(dim=-1)
    with torch.no_grad():
        plain = tiny(tokens)[0, own].log_softmax(dim=-1)
    for value, logs in zip(values, (steered, plain), strict=True):
        expected = sum(float(logs[n, token]) for n, token in enumerate(WRITTEN))
        assert value == pytest.approx(expected, abs=5e-4)
    assert abs(values[0] - values[1]) > 1.0


def test_writing_positions_are_those_whose_logits_write(tiny: HookedModel) -> None:
    prompt = tokenize(tiny, "Who?")
    n = len(prompt.tokens)
    assert list(Text(prompt, WRITTEN).writing) == list(range(n - 1, n + 4))
    assert list(Text(prompt).writing) == []


def test_a_text_without_anything_written_has_no_probability(tiny: HookedModel) -> None:
    with pytest.raises(SpanError, match="there must be tokens after the prompt, but 'Question"):
        log_probs(tiny, [Text(prompts_of(tiny)[1])])


def test_a_plan_of_another_model_is_refused(tiny: HookedModel, other_folder) -> None:
    plan: Plan = strong_plan(load_model(other_folder))
    with pytest.raises(PlanError, match="must be used on the model it was made on"):
        record_streams(tiny, [Text(prompts_of(tiny)[0], WRITTEN, plan)])


def test_a_recomputed_mean_is_refused_because_it_would_see_later_tokens(tiny: HookedModel) -> None:
    text = Text(prompts_of(tiny)[0], WRITTEN, strong_plan(tiny, mean="sequence"))
    for read in (record_streams, log_probs):
        with pytest.raises(
            PlanError, match="must need one token at a time to be read teacher-forced"
        ):
            read(tiny, [text])


def test_every_token_has_its_own_log_probability(tiny: HookedModel, executor: str) -> None:
    plan = strong_plan(tiny, 0.5)
    prompt = prompts_of(tiny)[1]
    texts = [Text(prompt, WRITTEN, plan), Text(prompt, WRITTEN[:2])]
    steered, plain = token_log_probs(tiny, texts, executor=executor)
    assert (len(steered), len(plain)) == (5, 2)
    with steering(tiny, plan, prompt=prompt), torch.no_grad():
        logits = tiny(torch.tensor([texts[0].tokens]))[0]
    start = len(prompt.tokens) - 1
    expected = logits[start : start + 5].log_softmax(dim=-1)[range(5), list(WRITTEN)]
    assert steered == pytest.approx(expected.tolist(), abs=1e-4)
    assert log_probs(tiny, texts, executor=executor) == [sum(steered), pytest.approx(sum(plain))]


@pytest.mark.parametrize("positions", ["all", "prompt", "completion"])
def test_the_positions_a_plan_names_are_those_where_the_stream_changes(
    tiny: HookedModel, positions: str
) -> None:
    for special in (False, True):
        plan = strong_plan(tiny, positions=positions, steer_special=special)
        prompt = prompts_of(tiny)[2]
        (streams,) = record_streams(tiny, [Text(prompt, (), plan)])
        changed = (streams.entering != streams.leaving).any(dim=-1).any(dim=0)
        assert plan.steered_positions(prompt.layout) == tuple(changed.nonzero()[:, 0].tolist())


@pytest.mark.parametrize("site", SITES)
def test_every_kind_of_step_is_read_as_it_is_generated(
    tiny: HookedModel, executor: str, site: str
) -> None:
    prompt = prompts_of(tiny)[0]
    plans = [plan for plan in every_plan(tiny).values() if site in plan.sites]
    texts = [Text(prompt, WRITTEN, plan) for plan in plans]
    done = Completion(text="", tokens=WRITTEN, ended=False)
    for text, own in zip(texts, token_log_probs(tiny, texts, executor=executor), strict=True):
        expected = by_hand(tiny, Row(prompt, text.plan), done).log_softmax(dim=-1)
        by_token = expected[range(len(WRITTEN)), WRITTEN]
        assert torch.allclose(torch.tensor(own), by_token, atol=5e-4)
    for text, streams in zip(texts, record_streams(tiny, texts, executor=executor), strict=True):
        changed = not torch.equal(streams.entering, streams.leaving)
        assert text.plan is not None
        assert changed == ("resid_post" in text.plan.sites)
