from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import prompts_of, strong_plan
from engine import largest_gap, same_bits, written
from kinds import SITES, affine_of, gate_of, step_of
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from torch import Tensor

from fusion_lens.decoding import Row
from fusion_lens.errors import ActivationError, ConfigError, ContrastError, PlanError
from fusion_lens.identity import ModelIdentity, identify
from fusion_lens.methods.dsas import FittedGate, constant_gate, fit_gate, gated
from fusion_lens.models import HookedModel, load_model
from fusion_lens.operators import gate_value
from fusion_lens.plan_files import load_plan, save_plan
from fusion_lens.plans import Plan
from fusion_lens.prompts import tokenize
from fusion_lens.site_activations import SiteActivations, record_at
from fusion_lens.teacher_forcing import Text


def acts(values: Tensor, site: str = "resid_post") -> SiteActivations:
    """Activations "text layer width" of a model that is only named."""
    n_layers, width = values.shape[1:]
    model = ModelIdentity("m", "TransformerBridge", "unprocessed", n_layers, width, "x", "w", "e")
    return SiteActivations(values, site, model)


def drawn(n: int, gaps: list[float], seed: int, width: int = 24) -> SiteActivations:
    """Random texts whose layer l is moved by `gaps[l]` along one direction."""
    values = torch.randn(n, len(gaps), width, generator=torch.Generator().manual_seed(seed))
    values[..., -3] += torch.tensor(gaps)
    return acts(values * torch.linspace(0.5, 3.0, width) + 4.0)


SOURCE, CONTROL = drawn(30, [0.0, 2.5, 6.0], 1), drawn(40, [0.0, 0.0, 0.0], 2)
X = torch.cat([SOURCE.values, CONTROL.values])
Y = np.arange(70) < 30


def probabilities(fitted: FittedGate, x: Tensor) -> Tensor:
    """g of every text, "text layer"."""
    gate = fitted.gate
    layers = range(x.shape[1])
    return torch.stack(
        [
            gate_value(x[None, :, n], gate.theta[None, n], gate.bias[None, n], gate.kind)[0]
            for n in layers
        ],
        dim=1,
    )


def pipeline(rank: int = 5) -> Any:
    """scikit-learn's own, with its default penalty."""
    return make_pipeline(
        PCA(rank, svd_solver="full"), LogisticRegression(tol=1e-10, max_iter=100_000)
    )


def test_the_gate_is_what_the_pipeline_predicts() -> None:
    found = probabilities(fit_gate(SOURCE, CONTROL), X)
    for layer in range(3):
        x = X[:, layer].double().numpy()
        expected = pipeline().fit(x, Y).predict_proba(x)[:, 1]
        np.testing.assert_allclose(found[:, layer].numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_gate_is_newtons_method_in_the_singular_vectors(scale: float) -> None:
    source, control = (acts(side.values * scale) for side in (SOURCE, CONTROL))
    fitted = fit_gate(source, control, rank=3)
    found = probabilities(fitted, X * scale)
    for layer in range(3):
        x = X[:, layer].double().numpy() * scale
        mean = x.mean(axis=0)
        directions = np.linalg.svd(x - mean, full_matrices=False)[2][:3]
        scores = np.hstack([(x - mean) @ directions.T, np.ones((70, 1))])
        penalty = np.diag([1.0, 1.0, 1.0, 0.0])
        w = np.zeros(4)
        for _ in range(200):
            p = 1 / (1 + np.exp(-scores @ w))
            slope = scores.T @ (p - Y) + penalty @ w
            curve = scores.T @ (scores * (p * (1 - p))[:, None]) + penalty
            w -= 0.5 * np.linalg.solve(curve, slope)
        expected = 1 / (1 + np.exp(-scores @ w))
        np.testing.assert_allclose(found[:, layer].numpy(), expected, atol=1e-5)
        theta = directions.T @ w[:3]
        np.testing.assert_allclose(fitted.gate.theta[layer].numpy(), theta, rtol=1e-3, atol=1e-9)


def test_a_toy_is_fitted_as_by_hand() -> None:
    """Texts at +1 and -1 on one axis, k of each: w solves 2k * sigmoid(-w) = w, and nothing moves
    the threshold from 0."""
    one = torch.zeros(6, 1, 3)
    one[..., 1] = 1.0
    fitted = fit_gate(acts(one), acts(-one), folds=2)
    theta = fitted.gate.theta[0].double()
    assert theta[[0, 2]].tolist() == pytest.approx([0.0, 0.0], abs=1e-7)
    assert 12 * float(torch.sigmoid(-theta[1])) == pytest.approx(float(theta[1]), abs=1e-5)
    assert fitted.gate.bias.tolist() == pytest.approx([0.0], abs=1e-7)
    assert (fitted.accuracy, fitted.training_accuracy) == ((1.0,), (1.0,))
    assert fitted.gate.open.tolist() == [True]


def test_accuracy_is_of_texts_left_out_of_pca_and_regression() -> None:
    fitted = fit_gate(SOURCE, CONTROL, folds=4, seed=7)
    for layer in range(3):
        x = X[:, layer].double().numpy()
        folds = StratifiedKFold(4, shuffle=True, random_state=7)
        shares = cross_val_score(pipeline(), x, Y, cv=folds)
        sizes = [len(left_out) for _, left_out in folds.split(x, Y)]
        assert fitted.accuracy[layer] == pytest.approx(np.average(shares, weights=sizes))
        assert fitted.training_accuracy[layer] == pytest.approx(pipeline().fit(x, Y).score(x, Y))


def test_a_layer_that_only_learns_its_texts_by_heart_is_closed() -> None:
    source, control = drawn(32, [0.0, 6.0], 3), drawn(32, [0.0, 0.0], 4)
    fitted = fit_gate(source, control, rank=24)
    assert fitted.training_accuracy[0] >= 0.75
    assert fitted.accuracy[0] < 0.65
    assert fitted.accuracy[1] > 0.9
    assert fitted.gate.open.tolist() == [False, True]
    assert fit_gate(source, control, rank=24, least_accuracy=0.0).gate.open.all()


def test_subjects_that_give_themselves_away_are_not_on_both_sides_of_a_fold() -> None:
    subjects = torch.randn(20, 1, 24, generator=torch.Generator().manual_seed(5)) * 5
    source, control = (
        acts(own.repeat_interleave(6, dim=0)) for own in (subjects[:10], subjects[10:])
    )
    names = [[f"{side}{n // 6}" for n in range(60)] for side in "sc"]
    alone = fit_gate(source, control, rank=19, folds=5)
    apart = fit_gate(source, control, rank=19, folds=5, groups=(names[0], names[1]))
    assert alone.accuracy == (1.0,)
    assert apart.accuracy[0] < 0.75
    assert not apart.gate.open[0]
    assert torch.equal(apart.gate.theta, alone.gate.theta)


def test_a_layer_on_which_all_texts_are_alike_is_closed() -> None:
    source, control = (acts(side.values.clone()) for side in (SOURCE, CONTROL))
    source.values[:, 1] = control.values[:, 1] = 2.5
    fitted = fit_gate(source, control, least_accuracy=0.5)
    assert (fitted.accuracy[1], fitted.training_accuracy[1]) == (0.5, 0.5)
    assert fitted.gate.open.tolist()[1:] == [False, True]
    assert not fitted.gate.theta[1].any()
    # one text alone differs: where it is left out, the fold knows the shares of the sides only
    source.values[0, 1] = 3.0
    assert fit_gate(source, control).accuracy[1] == pytest.approx(40 / 70)


def test_rank_is_no_more_than_texts_and_width_allow() -> None:
    source, control = drawn(3, [2.0], 6, width=4), drawn(3, [0.0], 7, width=4)
    lowered, exact = (fit_gate(source, control, rank=rank, folds=3) for rank in (50, 4))
    assert torch.equal(lowered.gate.theta, exact.gate.theta)


def test_what_is_fitted_is_kept_in_the_precision_of_the_activations() -> None:
    wide = [replace(side, values=side.values.double()) for side in (SOURCE, CONTROL)]
    double, single = fit_gate(*wide).gate, fit_gate(SOURCE, CONTROL).gate
    assert (double.theta.dtype, single.theta.dtype) == (torch.float64, torch.float32)
    assert torch.equal(double.theta.float(), single.theta)
    assert torch.equal(double.bias.float(), single.bias)


def test_permuted_labels_are_told_apart_by_chance_and_opened_as_asked() -> None:
    real = fit_gate(SOURCE, CONTROL)
    assert real.gate.open.tolist() == [False, True, True]
    permuted = fit_gate(SOURCE, CONTROL, permute=3, open=real.gate.open)
    assert max(permuted.accuracy) < 0.7
    assert torch.equal(permuted.gate.open, real.gate.open)
    again, other = (
        fit_gate(SOURCE, CONTROL, permute=seed, open=real.gate.open).gate.theta for seed in (3, 4)
    )
    assert torch.equal(again, permuted.gate.theta)
    assert not torch.equal(other, permuted.gate.theta)
    with pytest.raises(ConfigError, match="permuted labels must be told its open layers"):
        fit_gate(SOURCE, CONTROL, permute=3)


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
def test_a_constant_gate_has_its_mean_everywhere(kind: str) -> None:
    real = fit_gate(SOURCE, CONTROL, kind=kind)
    constant = constant_gate(real, torch.tensor([float("nan"), 0.25, 0.75]))
    found = probabilities(constant, X)[:, 1:]
    torch.testing.assert_close(found, torch.tensor([0.25, 0.75]).expand(70, 2))
    assert constant.gate.open.tolist() == [False, True, True]
    named_source = [30 / 70, 30 / 70] if kind == "relu" else [40 / 70, 30 / 70]
    assert constant.accuracy[1:] == pytest.approx(named_source)
    for bad in (-0.1, float("inf"), *((1.0,) if kind == "sigmoid" else ())):
        with pytest.raises(ActivationError, match=f"mean of a {kind} gate must be"):
            constant_gate(real, torch.tensor([0.5, bad, 0.5]))


def test_a_gate_shows_its_layers() -> None:
    fitted = fit_gate(SOURCE, CONTROL)
    told = fitted.table()
    assert told.title == "sigmoid gate at resid_post of m; 30 source, 40 control"
    assert [row[3] for row in told.rows] == ["closed", "open", "open"]
    assert told.rows[2][:2] == ("2", f"{fitted.accuracy[2]:.1%}")
    assert told.notes == ("Naming the larger side every time is right for 57.1%.",)
    assert repr(fitted) == "FittedGate(m, resid_post, sigmoid, 2 of 3 layers open)"


def test_sets_that_nothing_can_be_learned_from_are_refused() -> None:
    few = acts(SOURCE.values[:4])
    with pytest.raises(ContrastError, match=r"at least 5 texts.* got 4 source and 40 control"):
        fit_gate(few, CONTROL)
    with pytest.raises(ContrastError, match="got 0 source and 40 control"):
        fit_gate(acts(SOURCE.values[:0]), CONTROL)
    with pytest.raises(ContrastError, match=r"5 subjects.* got 2 source and 40 control"):
        fit_gate(SOURCE, CONTROL, groups=(["a", "b"] * 15, list(map(str, range(40)))))
    with pytest.raises(ContrastError, match="each of the 40 control texts, but got 3"):
        fit_gate(SOURCE, CONTROL, groups=(["a", "b"] * 15, ["c", "d", "e"]))
    with pytest.raises(ActivationError, match="must be of one site"):
        fit_gate(SOURCE, acts(CONTROL.values, "attn_z"))
    with pytest.raises(ActivationError, match="must come from one model"):
        fit_gate(SOURCE, acts(CONTROL.values[:, :2]))
    for options, told in (
        ({"rank": 0}, "rank must be at least 1"),
        ({"folds": 1}, "folds must be at least 2"),
        ({"least_accuracy": 1.1}, "0 <= least_accuracy <= 1"),
        ({"kind": "step"}, "a gate's kind must be one of sigmoid, relu"),
    ):
        with pytest.raises(ConfigError, match=told):
            fit_gate(SOURCE, CONTROL, **options)


def fitted_on(model: HookedModel, site: str) -> FittedGate:
    """Two kinds of sentences that a random model tells apart."""
    source = [f"Question: Who wrote the book of {n}?\nAnswer:" for n in range(8)]
    control = [f"{n}: the harbour is quiet in winter" for n in range(8)]
    sides = ([Text(tokenize(model, text)) for text in own] for own in (source, control))
    fitted = fit_gate(*(record_at(model, own, site, tokens="mean") for own in sides), folds=4)
    assert fitted.gate.open.any()
    return fitted


def test_every_step_at_the_site_is_gated_and_no_other(tiny: HookedModel) -> None:
    fitted = fitted_on(tiny, "resid_post")
    other = affine_of(tiny, "attn_z", gate=gate_of(tiny, "attn_z"))
    plan = gated(Plan((step_of(tiny), affine_of(tiny, "resid_post"), other)), fitted)
    assert [step.gate for step in plan.steps] == [fitted.gate, fitted.gate, other.gate]
    assert torch.equal(plan.steps[1].scale, affine_of(tiny, "resid_post").scale)


def test_a_plan_that_cannot_be_gated_is_refused(tiny: HookedModel, other_folder: Path) -> None:
    fitted = fitted_on(tiny, "resid_post")
    with pytest.raises(PlanError, match="step 2 has one"):
        gated(strong_plan(tiny) + gated(strong_plan(tiny), fitted), fitted)
    with pytest.raises(PlanError, match='must have mean="question"'):
        gated(strong_plan(tiny, mean="sequence"), fitted)
    with pytest.raises(PlanError, match="a site where the plan acts, attn_z, but got resid_post"):
        gated(Plan((affine_of(tiny, "attn_z"),)), fitted)
    with pytest.raises(PlanError, match="must belong to one model"):
        gated(strong_plan(load_model(other_folder)), fitted)
    narrow = replace(fitted, gate=replace(fitted.gate, theta=fitted.gate.theta[:, :8]))
    with pytest.raises(PlanError, match=r"theta must have the shape \(4, 32\)"):
        gated(strong_plan(tiny), narrow)


@pytest.mark.parametrize("site", SITES)
def test_a_gated_plan_writes_the_same_on_both_executors_alone_and_in_a_crowd(
    tiny: HookedModel, site: str, tmp_path: Path
) -> None:
    ungated = Plan((affine_of(tiny, site, positions="completion"),))
    plan = gated(ungated, fitted_on(tiny, site))
    rows = [Row(prompt, plan) for prompt in prompts_of(tiny)]
    shape: dict[str, Any] = {"slots": 4, "cache_length": 64}
    by_executor = [written(tiny, rows, executor=name, **shape) for name in ("lean", "hooks")]
    assert largest_gap(*by_executor) < 1e-4
    alone = [written(tiny, [row], executor="lean", **shape)[0] for row in rows]
    assert all(map(same_bits, by_executor[0], alone))
    bare = [Row(row.prompt) for row in rows]
    plain = written(tiny, bare, **shape)
    nothing = written(tiny, [Row(row.prompt, plan * 0.0) for row in rows], **shape)
    assert all(map(same_bits, nothing, plain))
    whole = written(tiny, [Row(row.prompt, ungated) for row in rows], **shape)
    assert largest_gap(by_executor[0], plain) > 1e-3
    assert largest_gap(by_executor[0], whole) > 1e-3
    save_plan(plan, tmp_path / "plan.safetensors")
    loaded = load_plan(tmp_path / "plan.safetensors")
    again = written(tiny, [Row(row.prompt, loaded) for row in rows], **shape)
    assert all(map(same_bits, again, by_executor[0]))
    assert loaded.steps[0].model == identify(tiny)
