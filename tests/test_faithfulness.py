from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import prompts_of, strong_plan
from test_attribution import linear

from fusion_lens.errors import ConfigError
from fusion_lens.faithfulness import Case, Faithfulness, Gain, faithfulness
from fusion_lens.generation import GenerationConfig
from fusion_lens.hooks import steering
from fusion_lens.models import HookedModel
from fusion_lens.preparation import TuningConfig
from fusion_lens.questions import Question
from fusion_lens.search import SearchConfig
from fusion_lens.tuning import tune

# together they span everything that is injected
SPANNING = [linear((layer,), 32, 32, f"layer {layer}") for layer in range(4)]
KS = (1, 8, 32)


def case(model: HookedModel, name: str = "red", scale: float = 1.0) -> Case:
    prompts = prompts_of(model)
    return Case(
        question_id=name,
        subject=name,
        plan=strong_plan(model, scale),
        prompts={"question": prompts[0], "paraphrase": prompts[2]},
        answer=(40, 41, 42),
        reference=(40, 41, 42, 43),
        completion=(50, 51, 52),
    )


@pytest.fixture(scope="module")
def cases(tiny: HookedModel) -> list[Case]:
    return [case(tiny), case(tiny, "blue", 0.5), case(tiny, "green", -0.5)]


@pytest.fixture(scope="module")
def measured(tiny: HookedModel, cases: list[Case]) -> Faithfulness:
    return faithfulness(tiny, SPANNING, cases, ks=KS, draws=2)


def nats(measured: Faithfulness, question: str, place: str, part: str, k: int = 0) -> float:
    (found,) = (
        gain.nats
        for gain in measured.gains
        if (gain.question_id, gain.place, gain.part, gain.k) == (question, place, part, k)
    )
    return found


def log_prob(model: HookedModel, item: Case, place: str, *, steered: bool) -> float:
    prompt = item.prompts[place]
    tokens = torch.tensor([prompt.tokens + item.answer])
    with torch.no_grad():
        if steered:
            with steering(model, item.plan, prompt=prompt):
                logits = model(tokens)
        else:
            logits = model(tokens)
    logs = logits[0, len(prompt.tokens) - 1 : -1].log_softmax(dim=-1)
    return float(sum(logs[n, token] for n, token in enumerate(item.answer)))


@pytest.mark.parametrize("place", ["question", "paraphrase"])
def test_the_full_gain_is_the_answers_log_probability_above_the_unsteered_models(
    tiny: HookedModel, cases: list[Case], measured: Faithfulness, place: str
) -> None:
    for item in cases:
        steered, plain = (log_prob(tiny, item, place, steered=on) for on in (True, False))
        got = nats(measured, item.question_id, place, "full")
        assert got == pytest.approx(steered - plain, abs=1e-3)


def test_all_features_of_a_spanning_dictionary_are_the_plan_and_its_error_is_nothing(
    measured: Faithfulness,
) -> None:
    for name in ("red", "blue", "green"):
        for place in ("question", "paraphrase"):
            full = nats(measured, name, place, "full")
            assert nats(measured, name, place, "top", 32) == pytest.approx(full, abs=2e-3)
            assert nats(measured, name, place, "without error") == pytest.approx(full, abs=2e-3)
            assert nats(measured, name, place, "error") == pytest.approx(0.0, abs=2e-3)
            # all 32 of 32 were drawn
            assert nats(measured, name, place, "random", 32) == pytest.approx(full, abs=2e-3)
    assert measured.ratio("top", 32).mean == pytest.approx(1.0, abs=1e-2)


def test_a_seed_draws_the_same_features_whatever_the_other_questions_are(
    tiny: HookedModel, cases: list[Case], measured: Faithfulness
) -> None:
    alone = faithfulness(tiny, SPANNING, cases[1:2], ks=KS, draws=2)
    for gain in alone.gains:
        assert nats(measured, "blue", gain.place, gain.part, gain.k) == gain.nats
    other = faithfulness(tiny, SPANNING, cases[1:2], ks=KS, draws=2, seed=1)
    assert nats(other, "blue", "question", "random", 1) != (
        nats(measured, "blue", "question", "random", 1)
    )


def made(**gains: tuple[float, float, float]) -> Faithfulness:
    """Three questions with (full, top, random) gains."""
    found = []
    for name, values in gains.items():
        for part, value in zip(("full", "top", "random"), values, strict=True):
            k = 0 if part == "full" else 10
            found.append(Gain(name, name, "question", part, k, value))
    return Faithfulness(tuple(found), dict.fromkeys(gains, 0.5), {10: 3.0})


def test_a_part_of_the_whole_is_a_ratio_of_sums() -> None:
    # a mean of ratios would be (0.5 + 0.5 + 100) / 3
    measured = made(a=(10.0, 5.0, 1.0), b=(4.0, 2.0, 0.0), c=(0.01, 1.0, 0.5))
    assert measured.ratio("top", 10).mean == pytest.approx(8.0 / 14.01)
    assert measured.interval("top", 10).mean == pytest.approx(8.0 / 3)
    assert measured.margin(10).mean == pytest.approx((4.0 + 2.0 + 0.5) / 3)
    assert measured.margin(10).low > 0
    assert measured.correlation.mean == 0.5
    content = measured.to_dict()
    assert list(content["curves"]) == ["question"]
    assert content["random_factors"] == {10: 3.0}
    assert content["curves"]["question"]["top"][0]["of_full"]["mean"] == pytest.approx(8.0 / 14.01)


def test_a_case_is_made_of_a_finished_search(tiny: HookedModel) -> None:
    config = TuningConfig(
        search=SearchConfig(trials=6, high=6.0),
        generation=GenerationConfig(max_new_tokens=6),
        explanation_tokens=0,
    )
    question = Question(
        "red", "Who wrote the red book?", "Ada Lovelace", paraphrases=("The red book is whose?",)
    )
    tuned = tune(tiny, question, config=config)
    item = Case.of(tiny, tuned, config)
    if item is None:
        assert tuned.tuned.zero_won
        return
    assert item.prompts["paraphrase"].text.startswith("Question: The red book is whose?")
    assert tiny.tokenizer.decode(item.answer) == "\nAda Lovelace"
    reference = tuned.job.prepared.reference
    assert item.prompts["question"].tokens + item.reference == reference.tokens
    assert item.completion == tuned.best.completion.tokens


def test_a_plan_that_does_nothing_is_no_case(tiny: HookedModel) -> None:
    config = TuningConfig(
        search=SearchConfig(trials=1),
        generation=GenerationConfig(max_new_tokens=4),
        explanation_tokens=0,
    )
    assert Case.of(tiny, tune(tiny, "Who?", "Ada", config=config), config) is None


def test_a_question_without_paraphrases_is_measured_in_one_place(
    tiny: HookedModel, cases: list[Case]
) -> None:
    alone = replace(cases[0], prompts={"question": cases[0].prompts["question"]})
    measured = faithfulness(tiny, SPANNING, [alone], ks=(1,), draws=1)
    assert {gain.place for gain in measured.gains} == {"question"}
    assert measured.interval("full", place="paraphrase").mean is None


def test_no_features_and_no_draws_are_refused(tiny: HookedModel, cases: list[Case]) -> None:
    with pytest.raises(ConfigError, match="every k and draws must be at least 1"):
        faithfulness(tiny, SPANNING, cases, ks=(0,))
