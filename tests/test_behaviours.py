from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import deltas_of

from fusion_lens.atlas import CONTRASTS
from fusion_lens.behaviours import UNSTEERED, Behaviour, Observed, Way
from fusion_lens.contrasts import Example, load_contrasts, of_kind
from fusion_lens.controls import with_vectors
from fusion_lens.decoding import Completion, GenerationConfig, Row
from fusion_lens.errors import ContextLengthError, ContrastError, PlanError
from fusion_lens.generation import generate
from fusion_lens.likelihood import completion_nll
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan, make_plan
from fusion_lens.prompts import tokenize

N, N_CONTROLS, TOKENS = 6, 8, 30
APPEAL = "in every known source"
EXAMPLES = [e for e in load_contrasts(CONTRASTS / "sources.jsonl") if e.part == "choose"]
SOURCES, TARGETS = (of_kind(EXAMPLES, kind)[:N] for kind in ("source", "target"))
CONTROLS = of_kind(EXAMPLES, "control")[:N_CONTROLS]
PREFIX = "It is known.\n\n"


@pytest.fixture(scope="module")
def behaviour(atlas: HookedModel) -> Behaviour:
    return Behaviour(atlas, [*SOURCES, *TARGETS, *CONTROLS], max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def strong(atlas: HookedModel) -> Plan:
    """What no text survives."""
    return make_plan(deltas_of(atlas), 4.0)


@pytest.fixture(scope="module")
def ways(strong: Plan) -> dict[str, Way]:
    return {
        "unsteered": UNSTEERED,
        "strong": Way((strong,)),
        "by turns": Way((strong, strong * 0.0) * (N // 2)),
        "weak": Way((strong * 0.02,)),
        "prefixed": Way(prefix=PREFIX),
        "prefixed and steered": Way((strong * 0.02,), PREFIX),
        "nothing": Way((strong * 0.0,)),
    }


@pytest.fixture(scope="module")
def seen(behaviour: Behaviour, ways: dict[str, Way]) -> dict[str, Observed]:
    """All of them at once: more than go into one call of the engine."""
    done: list[int] = []
    observed = behaviour.observe(list(ways.values()), progress=done.append)
    assert done == [6, 7]
    return dict(zip(ways, observed, strict=True))


def by_hand(model: HookedModel, texts: list[str], plans: list[Plan | None]) -> list[Completion]:
    rows = [Row(tokenize(model, text), own) for text, own in zip(texts, plans, strict=True)]
    return generate(model, rows, GenerationConfig(max_new_tokens=TOKENS))


def test_the_unsteered_model_shows_the_behaviour_and_keeps_every_control(
    behaviour: Behaviour, seen: dict[str, Observed]
) -> None:
    assert behaviour.n_shown == (N, N)
    found = seen["unsteered"]
    assert found.effect == found.transfer == found.wanted == (0.0,) * N
    assert found.kept == found.marked == (1.0,) * N_CONTROLS
    # what the model writes greedily is likely
    assert all(0 < nll < 0.3 for nll in found.nll)
    assert replace(seen["nothing"], nll=()) == replace(found, nll=())


def test_a_strong_plan_ends_the_behaviour_and_everything_else(seen: dict[str, Observed]) -> None:
    found = seen["strong"]
    assert found.effect == found.transfer == (1.0,) * N
    assert found.wanted == (0.0,) * N
    assert found.kept == found.marked == (0.0,) * N_CONTROLS
    assert all(nll > 1 for nll in found.nll)


def test_each_source_has_its_own_plan_and_so_has_the_control_of_its_place(
    seen: dict[str, Observed],
) -> None:
    found = seen["by turns"]
    assert found.effect == found.transfer == (1.0, 0.0) * (N // 2)
    # beyond the last source they begin again
    assert found.kept == found.marked == (0.0, 1.0) * (N_CONTROLS // 2)
    own = [nll > 1 for nll in found.nll]
    assert own == [True, False] * (N // 2)


@pytest.mark.parametrize("name", ["weak", "by turns", "prefixed", "prefixed and steered"])
def test_what_is_observed_is_what_is_written_by_hand(
    atlas: HookedModel, ways: dict[str, Way], seen: dict[str, Observed], name: str
) -> None:
    way, found = ways[name], seen[name]

    def write(texts: list[str]) -> list[Completion]:
        plans = [way.plans[n % len(way.plans)] if way.plans else None for n in range(len(texts))]
        return by_hand(atlas, [way.prefix + text for text in texts], plans)

    written = write([source.prompt for source in SOURCES])
    others = write([source.paraphrase or "" for source in SOURCES])
    kept = write([control.prompt for control in CONTROLS])
    plain = by_hand(atlas, [control.prompt for control in CONTROLS], [None] * N_CONTROLS)
    assert found.effect == tuple(float(APPEAL not in done.text) for done in written)
    assert found.transfer == tuple(float(APPEAL not in done.text) for done in others)
    assert found.kept == tuple(
        float(done.text == unsteered.text) for done, unsteered in zip(kept, plain, strict=True)
    )
    # given the prompt without what was put before it
    bare = [tokenize(atlas, source.prompt) for source in SOURCES]
    nlls = completion_nll(atlas, list(zip(bare, written, strict=True)))
    assert found.nll == pytest.approx(nlls, abs=1e-4)
    if name in ("weak", "prefixed"):
        # neither all nor nothing: a mistake would be seen
        assert len(set(found.kept)) == 2


def test_a_way_does_the_same_whatever_is_observed_beside_it(
    behaviour: Behaviour, ways: dict[str, Way], seen: dict[str, Observed]
) -> None:
    for name in ("weak", "prefixed"):
        (alone,) = behaviour.observe([ways[name]])
        # a prefix has another length of cache alone: other bits
        near = pytest.approx(seen[name].nll, abs=1e-4 if ways[name].prefix else 0.0)
        assert alone.nll == near
        assert replace(alone, nll=()) == replace(seen[name], nll=())


def test_what_is_not_asked_for_is_unscored_and_nothing_else(
    behaviour: Behaviour, ways: dict[str, Way], seen: dict[str, Observed]
) -> None:
    (found,) = behaviour.observe([ways["weak"]], paraphrased=False)
    assert found == replace(seen["weak"], transfer=(None,) * N)
    (found,) = behaviour.observe([ways["weak"]], likelihood=False)
    assert found == replace(seen["weak"], nll=(None,) * N)


def test_what_there_is_nothing_to_tell_by_is_unscored(atlas: HookedModel, strong: Plan) -> None:
    sources = [
        # not what it writes, nor in other words
        replace(SOURCES[0], text=TARGETS[0].text, marker=TARGETS[0].marker),
        replace(SOURCES[1], paraphrase=None),
        # a paraphrase that asks for something else
        replace(SOURCES[2], paraphrase=CONTROLS[0].prompt),
        SOURCES[3],
    ]
    targets = [TARGETS[0], replace(TARGETS[1], marker=None), TARGETS[3]]
    controls = [CONTROLS[0], replace(CONTROLS[1], marker=None)]
    behaviour = Behaviour(atlas, [*controls, *targets, *sources], max_new_tokens=TOKENS)
    assert behaviour.n_shown == (3, 1)
    assert [target and target.id for target in behaviour.targets] == [
        *(TARGETS[0].id, TARGETS[1].id),
        *(None, TARGETS[3].id),
    ]
    plain, steered = behaviour.observe([UNSTEERED, Way((strong,))])
    for found, gone in ((plain, 0.0), (steered, 1.0)):
        assert found.effect == (None, gone, gone, gone)
        assert found.transfer == (None, None, None, gone)
        assert found.wanted == (0.0, None, None, 0.0)
        assert found.kept == (1 - gone, 1 - gone)
        assert found.marked == (1 - gone, None)
        assert None not in found.nll


def test_a_wanted_marker_is_found(atlas: HookedModel) -> None:
    """Where the target is what the model writes anyway."""
    target = replace(TARGETS[0], text=SOURCES[0].text, marker=APPEAL)
    behaviour = Behaviour(atlas, [SOURCES[0], target, CONTROLS[0]], max_new_tokens=TOKENS)
    (found,) = behaviour.observe([UNSTEERED])
    assert (found.effect, found.wanted) == ((0.0,), (1.0,))


def test_texts_that_show_nothing_are_refused(atlas: HookedModel) -> None:
    def behaviour_of(*examples: Example, tokens: int = 1) -> Behaviour:
        return Behaviour(atlas, examples, max_new_tokens=tokens)

    with pytest.raises(ContrastError, match="sources and controls, but got 1 and 0"):
        behaviour_of(SOURCES[0], TARGETS[0])
    with pytest.raises(ContrastError, match="sources and controls, but got 0 and 1"):
        behaviour_of(CONTROLS[0], TARGETS[0])
    with pytest.raises(ContrastError, match="'sources-choose-source-01' must have a marker"):
        behaviour_of(replace(SOURCES[0], marker=None), CONTROLS[0])
    with pytest.raises(ContrastError, match="must have prompts to be asked, but 'sources-choose"):
        behaviour_of(replace(SOURCES[0], prompt=""), CONTROLS[0])
    with pytest.raises(ContrastError, match="on some source, but does so on none of 2"):
        behaviour_of(*SOURCES[:2], CONTROLS[0])
    with pytest.raises(ContextLengthError):
        behaviour_of(SOURCES[0], CONTROLS[0], tokens=int(atlas.cfg.n_ctx))


def test_plans_and_prefixes_that_do_not_fit_are_refused(
    behaviour: Behaviour, strong: Plan, other_atlas: HookedModel
) -> None:
    with pytest.raises(PlanError, match="one for each of the 6 sources, but got 2"):
        behaviour.observe([UNSTEERED, Way((strong, strong))])
    with pytest.raises(PlanError, match="used on the model it was made on"):
        behaviour.observe([Way((make_plan(deltas_of(other_atlas), 1.0),))])
    with pytest.raises(ContextLengthError):
        behaviour.observe([Way(prefix=PREFIX * 200)])


def test_logits_that_are_not_finite_are_no_effect(atlas: HookedModel, behaviour: Behaviour) -> None:
    own = deltas_of(atlas)
    # six layers of it are more than float32 holds
    huge = make_plan(with_vectors(own, torch.full_like(own.vectors, 1e32)), 9e5)
    (done,) = generate(atlas, [Row(tokenize(atlas, SOURCES[0].prompt), huge)])
    assert not done.finite
    (broken,) = behaviour.observe([Way((huge,))])
    for values in (broken.effect, broken.transfer, broken.wanted, broken.kept, broken.marked):
        assert set(values) == {0.0}
