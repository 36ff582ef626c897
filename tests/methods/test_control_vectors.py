from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import assert_a_plan_like_any, sides_of, toy
from torch import Tensor

from fusion_lens.errors import ActivationError, ConfigError, PlanError
from fusion_lens.methods.control_vectors import control_vectors
from fusion_lens.models import HookedModel
from fusion_lens.plans import Segment


def shift_of(differences: Tensor, **options: object) -> Tensor:
    """Of pairs that differ by these, "pair layer d_model"."""
    wrong = torch.arange(differences.numel()).view(differences.shape).float()
    plan = control_vectors(toy(wrong + differences), toy(wrong), **options)  # type: ignore[arg-type]
    return plan.steps[0].shift


def test_the_vector_is_the_component_of_the_differences_as_they_are() -> None:
    # centred, the first component would be the second axis
    differences = torch.tensor([[[4.0, 1.0]], [[4.0, -1.0]]])
    torch.testing.assert_close(shift_of(differences), torch.tensor([[1.0, 0.0]]))
    assert shift_of(differences, how="mean").tolist() == [[4.0, 0.0]]


def test_the_sign_is_that_of_most_pairs_then_of_the_mean_then_of_the_largest_entry() -> None:
    for projections, sign in (
        ((1.0, 1.0, -5.0), 1.0),
        ((-1.0, -1.0, 5.0), -1.0),
        ((3.0, -1.0), 1.0),
        ((-3.0, 1.0), -1.0),
        ((0.0, 2.0, -1.0, 0.0), 1.0),
        ((2.0, -2.0), 1.0),
        ((-2.0, 2.0), 1.0),
    ):
        differences = torch.tensor(projections)[:, None, None] * torch.tensor([0.75, 1.0])
        expected = torch.tensor([[0.6, 0.8]]) * sign
        torch.testing.assert_close(shift_of(differences), expected)


def test_a_layer_without_differences_gets_the_zero_vector() -> None:
    differences = torch.tensor([[[0.0, 0.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 3.0]]])
    for how, size in (("pca", 1.0), ("mean", 2.5)):
        torch.testing.assert_close(
            shift_of(differences, how=how), torch.tensor([[0.0, 0.0], [0.0, size]])
        )
    with pytest.raises(ActivationError, match="must differ on a layer that is steered, but all"):
        shift_of(differences, layers=[0])
    with pytest.raises(ActivationError, match="must differ on a layer that is steered, but all"):
        shift_of(differences * 0.0)


@pytest.mark.parametrize("how", ["pca", "mean"])
def test_it_is_what_numpy_makes_of_the_formula(tiny: HookedModel, how: str) -> None:
    right, wrong = sides_of(tiny)
    (step,) = control_vectors(right, wrong, how=how).steps
    differences = right.values.numpy().astype(np.float64) - wrong.values.numpy()
    for layer in range(4):
        d = differences[:, layer]
        expected = d.mean(axis=0)
        if how == "pca":
            # the eigenvector of the second moments, not of the covariance
            expected = np.linalg.eigh(d.T @ d)[1][:, -1]
            expected *= np.sign(np.sign(d @ expected).sum())
            assert np.linalg.norm(expected) == pytest.approx(1.0)
        np.testing.assert_allclose(step.shift[layer].numpy(), expected, atol=1e-5)
    assert step.positions == "all"


def test_only_the_layers_named_are_steered(tiny: HookedModel) -> None:
    right, wrong = sides_of(tiny)
    every = control_vectors(right, wrong).steps[0].shift
    (step,) = control_vectors(right, wrong, layers=[3, 1], positions="completion").steps
    assert step.segments == (Segment("layer_3", 3, 4), Segment("layer_1", 1, 2))
    assert torch.equal(step.shift[[1, 3]], every[[1, 3]])
    assert step.shift[[0, 2]].count_nonzero() == 0
    assert step.positions == "completion"


@pytest.mark.parametrize("how", ["pca", "mean"])
def test_the_plan_runs_like_any(tiny: HookedModel, tmp_path: Path, how: str) -> None:
    assert_a_plan_like_any(tiny, control_vectors(*sides_of(tiny), how=how), 5.0, tmp_path)


def test_what_cannot_be_fitted_is_refused(tiny: HookedModel) -> None:
    sides = sides_of(tiny, n_pairs=2)
    with pytest.raises(ConfigError, match="how must be one of pca, mean, but got 'median'"):
        control_vectors(*sides, how="median")
    with pytest.raises(PlanError, match=r"but got \(layer=4, n_layers=4\)"):
        control_vectors(*sides, layers=[1, 4])
    with pytest.raises(PlanError, match="at least one layer to steer, but got none"):
        control_vectors(*sides, layers=[])
    with pytest.raises(PlanError, match="names must be unique, but got layer_1, layer_1"):
        control_vectors(*sides, layers=[1, 1])
