from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from kinds import affine_of, gate_of, step_of
from torch import Tensor

from fusion_lens.atlas import CONTRASTS
from fusion_lens.contrast_texts import example_texts
from fusion_lens.contrasts import KINDS, Example, load_contrasts, of_kind
from fusion_lens.deltas import Deltas
from fusion_lens.errors import ConfigError, ContrastError
from fusion_lens.gate_values import gate_values
from fusion_lens.method_suite import (
    GATES,
    METHODS,
    STRENGTHS,
    Line,
    Suite,
    count_scalars,
    line_name,
    mean_deltas,
)
from fusion_lens.methods.prompting import demonstrations
from fusion_lens.models import SITES, HookedModel
from fusion_lens.plans import Plan, Segment

pytestmark = pytest.mark.slow

N_LAYERS, D_MODEL = 6, 192
UNITS = (1, 10)
ALL = load_contrasts(CONTRASTS / "sources.jsonl")
# the variants of each method
LAYERS = [f"layer {n}" for n in range(6)]
FITTED = {
    "prompting": [""],
    "fusion": [""],
    "generic": [""],
    "fusion_masked": ["1 units", "10 units"],
    "generic_masked": ["1 units", "10 units"],
    "caa": LAYERS,
    "act_add": LAYERS,
    "control_mean": [""],
    "control_pca": [""],
    "iti": ["2 heads", "4 heads", "9 heads", "18 heads"],
    "austeer": [site for site in SITES for _ in UNITS],
}


def some(part: str, n: int) -> list[Example]:
    own = [each for each in ALL if each.part == part]
    return [each for kind in KINDS for each in of_kind(own, kind)[:n]]


FIT, ASKED = some("fit", 10), some("choose", 3)


@pytest.fixture(scope="module")
def suite(atlas: HookedModel) -> Suite:
    return Suite(atlas, FIT, units=UNITS)


@pytest.fixture(scope="module")
def lines(suite: Suite) -> dict[str, list[Line]]:
    made = {method: suite.lines(method, ASKED) for method in FITTED}
    made["linear_act"] = suite.lines("linear_act", ASKED, variant="mlp_out")
    return made


@pytest.fixture(scope="module")
def gates(suite: Suite, lines: dict[str, list[Line]]) -> dict[str, Line]:
    """Every kind of gate on Fusion Steering."""
    (line,) = lines["fusion"]
    made = {kind: suite.gated_line(line, kind) for kind in GATES}
    return {kind: own for kind, own in made.items() if own is not None}


def shift_of(plan: Plan) -> Tensor:
    (step,) = plan.steps
    return step.move.shift


def by_hand(model: Any, example: Example) -> Tensor:
    """Mean residual of what an example writes less that of its prompt, from TransformerLens."""
    (text,) = example_texts(model, [example])
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([text.tokens]))
    streams = torch.stack([cache[f"blocks.{n}.hook_resid_post"][0] for n in range(N_LAYERS)])
    n_prompt = len(text.prompt.tokens)
    asked = [t for t in range(n_prompt) if t not in text.prompt.special]
    return streams[:, n_prompt:].mean(dim=1) - streams[:, asked].mean(dim=1)


def test_all_methods_have_equally_many_strengths_that_grow() -> None:
    assert set(STRENGTHS) == set(METHODS)
    for strengths in STRENGTHS.values():
        assert len(strengths) == 6
        assert list(strengths) == sorted(set(strengths))
        assert strengths[0] > 0


def test_a_line_is_a_variant_at_every_strength(lines: dict[str, list[Line]]) -> None:
    assert {method: [own.variant for own in made] for method, made in lines.items()} == {
        **FITTED,
        "linear_act": ["mlp_out"],
    }
    # a first component is scaled to the mean difference's length
    mean = shift_of(lines["control_mean"][0].ways[0].plans[0]) / STRENGTHS["control_mean"][0]
    length = float(mean.norm(dim=-1).mean())
    for method, made in lines.items():
        for line in made:
            assert (line.name, line.gate) == (line.method, "")
            assert line.method.removesuffix("_1").removesuffix("_10") == method
            assert line.strengths == STRENGTHS[method]
            assert len(line.ways) == len(line.strengths)
            for strength, way in zip(line.strengths, line.ways, strict=True):
                assert len(way.plans) == {"prompting": 0, "fusion": 3, "fusion_masked": 3}.get(
                    method, 1
                )
                for plan in way.plans:
                    unit = length if method == "control_pca" else 1.0
                    for coeff in plan.coeffs.values():
                        assert coeff == pytest.approx(strength * unit)


def test_prompting_puts_so_many_targets_before_a_prompt(lines: dict[str, list[Line]]) -> None:
    (line,) = lines["prompting"]
    targets = of_kind(FIT, "target")
    for n, way in zip((1, 2, 3, 4, 6, 8), line.ways, strict=True):
        assert way.prefix == demonstrations(targets, n, seed=0)
        assert way.prefix.count("Question:") == n
    assert line.n_scalars == 0


def test_fusion_has_the_deltas_of_the_very_target_asked_for(
    atlas: HookedModel, suite: Suite, lines: dict[str, list[Line]]
) -> None:
    (line,) = lines["fusion"]
    for plan, target in zip(line.ways[4].plans, of_kind(ASKED, "target"), strict=True):
        torch.testing.assert_close(shift_of(plan), by_hand(atlas, target), atol=1e-4, rtol=1e-4)
    assert line.strengths[4] == 1.0
    assert line.n_scalars == N_LAYERS * D_MODEL
    # in the order of the sources, whatever that of the targets
    asked = [*ASKED[2::-1], *ASKED[3:]]
    (turned,) = suite.lines("fusion", asked)
    for own, other in zip(turned.ways[0].plans, line.ways[0].plans[::-1], strict=True):
        torch.testing.assert_close(shift_of(own), shift_of(other), atol=1e-5, rtol=1e-5)


def test_generic_has_the_mean_delta_of_the_fitted_targets(
    atlas: HookedModel, lines: dict[str, list[Line]]
) -> None:
    (line,) = lines["generic"]
    each = torch.stack([by_hand(atlas, target) for target in of_kind(FIT, "target")])
    expected = each.mean(dim=0)
    torch.testing.assert_close(shift_of(line.ways[4].plans[0]), expected, atol=1e-4, rtol=1e-4)
    # strength 0.2 beside 1
    torch.testing.assert_close(
        shift_of(line.ways[1].plans[0]), 0.2 * expected, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("base", ["fusion", "generic"])
def test_a_mask_keeps_the_units_that_the_fitted_targets_agree_on(
    atlas: HookedModel, lines: dict[str, list[Line]], base: str
) -> None:
    each = torch.stack([by_hand(atlas, target) for target in of_kind(FIT, "target")])
    score = torch.maximum((each > 0).double().mean(dim=0), (each < 0).double().mean(dim=0))
    (whole,) = lines[base]
    for line, k in zip(lines[f"{base}_masked"], UNITS, strict=True):
        assert line.n_scalars == k
        for plan, bare in zip(line.ways[0].plans, whole.ways[0].plans, strict=True):
            kept = shift_of(plan) != 0
            assert int(kept.sum()) == k
            assert float(score[kept].min()) == float(score.flatten().topk(k).values.min())
            assert torch.equal(shift_of(plan)[kept], shift_of(bare)[kept])


def test_austeer_scales_so_many_units_of_one_site(lines: dict[str, list[Line]]) -> None:
    for line in lines["austeer"]:
        (step,) = line.ways[0].plans[0].steps
        assert step.site == line.variant
        assert line.method == f"austeer_{line.n_scalars}"
        assert int((step.move.scale != 0).sum()) == line.n_scalars


def test_another_ranking_takes_the_place_of_consistency(suite: Suite) -> None:
    (plan,) = suite.austeer("mlp_out", 3, lambda found: found.ranking.flip(0))
    (step,) = plan.steps
    least = suite.momenta("mlp_out").score.flatten().min()
    kept = step.scale != 0
    assert int(kept.sum()) == 3
    assert set(step.scale[kept].abs().tolist()) == {float(least)}


def test_a_gate_stands_on_every_plan_of_a_line(
    lines: dict[str, list[Line]], gates: dict[str, Line]
) -> None:
    (bare,) = lines["fusion"]
    assert list(gates) == list(GATES)
    for kind, line in gates.items():
        assert (line.gate, line.name) == (kind, f"fusion + {kind} gate")
        assert line.seconds > bare.seconds
        for way, plain in zip(line.ways, bare.ways, strict=True):
            for plan, other in zip(way.plans, plain.plans, strict=True):
                (step,) = plan.steps
                assert step.gate is not None
                kept = step.gate.open[:, None].expand(N_LAYERS, D_MODEL)
                assert torch.equal(shift_of(plan)[kept], shift_of(other)[kept])
    opened = {tuple(step.gate.open.tolist()) for step in map(step_with_gate, gates.values())}
    assert len(opened) == 1
    theta = {kind: step_with_gate(line).gate.theta for kind, line in gates.items()}
    assert not torch.equal(theta["dsas"], theta["permuted"])
    assert not theta["constant"].any()


def step_with_gate(line: Line) -> Any:
    (step,) = line.ways[0].plans[0].steps
    return step


def test_a_constant_gate_gives_as_much_on_average_as_the_gate_it_stands_beside(
    atlas: HookedModel, gates: dict[str, Line]
) -> None:
    shown = [each for each in FIT if each.kind != "target"]

    def values_of(kind: str) -> Tensor:
        # nothing is injected, so that both read the same
        idle = gates[kind].ways[0].plans[0] * 0.0
        texts = [replace(text, plan=idle) for text in example_texts(atlas, shown)]
        return torch.cat([own.values for (own,) in gate_values(atlas, texts)], dim=1)

    dsas, constant = values_of("dsas"), values_of("constant")
    assert torch.equal(dsas.isnan(), constant.isnan())
    torch.testing.assert_close(
        constant.nanmean(dim=1), dsas.nanmean(dim=1), atol=1e-4, rtol=1e-4, equal_nan=True
    )
    steered = ~constant[0].isnan()
    assert float(constant[:, steered].var(dim=1).max()) < 1e-9
    assert float(dsas[:, steered].var(dim=1).min()) > 1e-3


def test_where_there_is_nothing_to_gate_there_is_no_line(
    atlas: HookedModel, suite: Suite, lines: dict[str, list[Line]]
) -> None:
    (line,) = lines["prompting"]
    assert suite.gated_line(line, "dsas") is None
    # sources and controls are the same texts: no layer tells them apart
    controls = of_kind(FIT, "control")
    alike = [replace(each, id=f"{each.id}-too", kind="source") for each in controls]
    blind = Suite(atlas, [*alike, *controls, *of_kind(FIT, "target")])
    assert not blind.gate("resid_post").gate.open.any()
    for kind in GATES:
        assert blind.gated_line(lines["generic"][0], kind) is None


def test_a_recording_counts_for_all_who_use_it(suite: Suite, lines: dict[str, list[Line]]) -> None:
    """Not for the first alone: what is kept makes the second no cheaper a method."""
    (line,) = lines["generic"]
    suite.gated_line(line, "dsas")
    began = time.perf_counter()
    again = suite.gated_line(line, "dsas")
    wall = time.perf_counter() - began
    assert again is not None
    assert again.seconds - line.seconds > wall
    began = time.perf_counter()
    fitted = suite.lines("austeer", ASKED, variant="mlp_out")[0]
    assert fitted.seconds > time.perf_counter() - began


def test_the_scalars_of_a_step_are_what_it_adds_where_it_acts(tiny: HookedModel) -> None:
    units = torch.zeros(4, 32, dtype=torch.bool)
    units[1, 3] = units[2, :5] = True
    assert count_scalars(Plan((step_of(tiny),))) == 4 * 32
    assert count_scalars(Plan((step_of(tiny, units=units),))) == 6
    # closed on the second layer, with theta and a bias on each of the others
    gate = gate_of(tiny, "resid_post")
    assert count_scalars(Plan((step_of(tiny, gate=gate),))) == 3 * 32 + 3 * (32 + 1)
    assert count_scalars(Plan((step_of(tiny, units=units, gate=gate),))) == 5 + 3 * 33
    constant = replace(gate, theta=torch.zeros_like(gate.theta))
    assert count_scalars(Plan((step_of(tiny, units=units, gate=constant),))) == 5 + 3


def test_the_scalars_of_an_affine_step_are_scales_shifts_and_bounds(tiny: HookedModel) -> None:
    # of 32 dimensions every third one is scaled, 11, and every next one shifted, 11
    assert count_scalars(Plan((affine_of(tiny, "mlp_out"),))) == 4 * (11 + 11)
    low = torch.full((4, 32), -torch.inf)
    low[:, :2] = 0.0
    high = torch.full((4, 32), torch.inf)
    high[3] = 1.0
    bounded = affine_of(tiny, "mlp_out", low=low, high=high)
    assert count_scalars(Plan((bounded,))) == 4 * 22 + 4 * 2 + 32
    one = affine_of(
        tiny, "mlp_out", low=low, high=high, segments=(Segment("one", 1, 2),), coeffs=(1.0,)
    )
    assert count_scalars(Plan((one,))) == 22 + 2
    assert count_scalars(Plan((one, bounded))) == 24 + 128


def test_the_mean_of_deltas_is_that_of_both_ends(tiny: HookedModel) -> None:
    deltas = step_of(tiny).deltas
    assert isinstance(deltas, Deltas)
    doubled = replace(deltas, reference=3 * deltas.reference, base=2 * deltas.base)
    found = mean_deltas([deltas, doubled])
    torch.testing.assert_close(found.reference, 2 * deltas.reference)
    torch.testing.assert_close(found.base, 1.5 * deltas.base)


def test_a_line_is_named_after_method_and_gate() -> None:
    assert line_name("caa", "") == "caa"
    assert line_name("caa", "dsas") == "caa + dsas gate"


def test_heads_are_moved_as_many_as_the_variant_says(lines: dict[str, list[Line]]) -> None:
    for line in lines["iti"]:
        moved = shift_of(line.ways[0].plans[0]).reshape(N_LAYERS, 6, -1).any(dim=-1)
        assert f"{int(moved.sum())} heads" == line.variant


def test_fusion_without_a_mask_reads_no_other_text(atlas: HookedModel) -> None:
    fresh = Suite(atlas, FIT)
    (line,) = fresh.lines("fusion", ASKED)
    assert fresh._known == {}
    (again,) = fresh.lines("fusion_masked", ASKED, variant="10 units")
    assert list(fresh._known) == [("deltas",)]
    assert line.n_scalars > again.n_scalars


def test_texts_that_a_method_cannot_learn_from_are_refused(atlas: HookedModel) -> None:
    for kind in KINDS:
        without = [each for each in FIT if each.kind != kind]
        with pytest.raises(ContrastError, match=f"but no {kind} is there"):
            Suite(atlas, without)
    apart = [
        replace(each, prompt=f"Well. {each.prompt}") if each.kind == "target" else each
        for each in FIT
    ]
    unpaired = Suite(atlas, apart)
    assert unpaired.pairs == []
    for method in ("austeer", "caa", "act_add", "control_mean", "control_pca", "iti"):
        with pytest.raises(ContrastError, match=r"learns from pairs must have targets with the"):
            unpaired.lines(method, ASKED)


def test_fusion_must_be_told_a_target_for_every_source(suite: Suite) -> None:
    asked = [each for each in ASKED if each.id != of_kind(ASKED, "target")[1].id]
    with pytest.raises(ContrastError, match=r"1 of 3 have none, 'sources-choose-source-02' first"):
        suite.lines("fusion", asked)
    # the others do not care
    assert len(suite.lines("generic", asked)) == 1


def test_names_that_there_are_not_are_refused(suite: Suite, lines: dict[str, list[Line]]) -> None:
    with pytest.raises(ConfigError, match="method must be one of prompting, fusion"):
        suite.lines("magic", ASKED)
    with pytest.raises(ConfigError, match="gate must be one of dsas, permuted, constant"):
        suite.gated_line(lines["generic"][0], "open")
    with pytest.raises(ConfigError, match="1 <= k <= 1152 units must hold, but got 5000"):
        Suite(suite.model, FIT, units=(5000,)).lines("generic_masked", ASKED)


def test_pairs_are_a_source_and_the_target_of_its_prompt(suite: Suite) -> None:
    assert [(right.kind, wrong.kind) for right, wrong in suite.pairs] == [("target", "source")] * 10
    assert all(right.prompt == wrong.prompt for right, wrong in suite.pairs)
