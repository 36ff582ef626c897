from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import assert_a_plan_like_any, sides_of, toy
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fusion_lens.errors import ActivationError, ConfigError
from fusion_lens.methods.iti import Iti, iti
from fusion_lens.models import HookedModel
from fusion_lens.plans import Affine


def shift_of(found: Iti) -> Tensor:
    (step,) = found.plan.steps
    assert isinstance(step, Affine)
    return step.shift


def heads_by_hand() -> tuple[Tensor, Tensor]:
    """Ten pairs, two layers of two heads of width 2: the first head tells every pair, the second
    never changes, the third differs in its mean alone by one outlier, the fourth not at all."""
    true, false = torch.zeros(2, 10, 2, 2, 2)
    wobble = torch.tensor([1.0, -1.0] * 5)
    true[:, 0, 0, 0], false[:, 0, 0, 0] = 3.0 + wobble, -3.0 + wobble
    true[:, 0, 1], false[:, 0, 1] = 7.0, 7.0
    true[:, 1, 0, 1], false[:, 1, 0, 1] = wobble, wobble
    true[0, 1, 0, 1] += 10.0
    true[:, 1, 1, 0], false[:, 1, 1, 0] = wobble, -wobble
    return true, false


def test_a_head_is_moved_along_its_mean_difference_by_its_spread() -> None:
    true, false = (toy(side.flatten(2), "attn_z") for side in heads_by_hand())
    found = iti(true, false, 2)
    assert found.accuracies[0].tolist() == [1.0, 0.5]
    assert found.accuracies[1, 1] == 0.5
    # heads without a difference of means are not kept, though there is room
    assert found.heads == ((0, 0), (1, 0))
    expected = torch.zeros(2, 2, 2)
    # values -4, -2, 2, 4, as many of each
    expected[0, 0, 0] = 10.0**0.5
    # 9 of 1, 10 of -1 and one of 11
    spread = np.std([1.0] * 9 + [-1.0] * 10 + [11.0])
    expected[1, 0, 1] = float(spread)
    torch.testing.assert_close(shift_of(found), expected.flatten(1))
    (step,) = found.plan.steps
    assert isinstance(step, Affine)
    assert (step.site, step.positions) == ("attn_z", "completion")
    assert step.scale.count_nonzero() == 0


def by_numpy(true: Tensor, false: Tensor, n_heads: int, folds: list[int]) -> tuple[np.ndarray, ...]:
    """Shift of every head, "layer head d_head", and the accuracies of its probes."""
    both = [side.numpy().astype(np.float64) for side in (true, false)]
    n, n_layers, width = both[0].shape
    d_head = width // n_heads
    shifts, accuracies = np.zeros((n_layers, n_heads, d_head)), np.zeros((n_layers, n_heads))
    for layer in range(n_layers):
        for head in range(n_heads):
            own = slice(head * d_head, (head + 1) * d_head)
            z = np.concatenate([side[:, layer, own] for side in both])
            labels = np.array([1] * n + [0] * n)
            theta = z[:n].mean(axis=0) - z[n:].mean(axis=0)
            theta /= np.linalg.norm(theta)
            shifts[layer, head] = (z @ theta).std() * theta
            right = 0
            for fold in sorted({*folds}):
                held = np.array(folds * 2) == fold
                probe = LogisticRegression(max_iter=1000).fit(z[~held], labels[~held])
                right += (probe.predict(z[held]) == labels[held]).sum()
            accuracies[layer, head] = right / (2 * n)
    return shifts, accuracies


def test_it_is_what_numpy_and_one_probe_a_fold_make_of_the_formulas(tiny: HookedModel) -> None:
    true, false = sides_of(tiny, "attn_z")
    # five groups make the folds, whatever their order
    folds = [n % 5 for n in range(20)]
    found = iti(true, false, 4, n_kept=3, groups=[f"subject {n}" for n in folds], seed=3)
    shifts, accuracies = by_numpy(true.values, false.values, 4, folds)
    np.testing.assert_allclose(found.accuracies.numpy(), accuracies, atol=1e-9)
    places = [(layer, head) for layer in range(4) for head in range(4)]
    assert list(found.heads) == sorted(places, key=lambda place: (-accuracies[place], place))[:3]
    expected = np.zeros_like(shifts)
    for place in found.heads:
        expected[place] = shifts[place]
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(shift_of(found).numpy(), expected.reshape(4, -1), atol=1e-5)


def test_no_group_is_in_two_folds() -> None:
    """Pairs of one group are alike, and the label is drawn for each: a probe that had seen its own
    group would tell all of them."""
    rng = torch.Generator().manual_seed(0)
    centres = 4.0 * torch.randn(10, 64, generator=rng)
    sign = torch.where(torch.randn(10, generator=rng) > 0, 1.0, -1.0)
    noise = 0.01 * torch.randn(2, 60, 64, generator=rng)
    places = torch.arange(60) % 10
    own = sign[places][:, None] * centres[places]
    true, false = (
        toy((side + part)[:, None], "attn_z") for side, part in zip((own, -own), noise, strict=True)
    )
    apart = iti(true, false, 1, groups=places.tolist()).accuracies
    mixed = iti(true, false, 1).accuracies
    assert mixed.item() == 1.0
    assert apart.item() < 0.8


def test_the_seed_deals_the_pairs_and_the_same_one_deals_them_again(tiny: HookedModel) -> None:
    true, false = sides_of(tiny, "attn_z")
    rng = torch.Generator().manual_seed(1)
    hard = [
        toy(side.values + 3.0 * torch.randn(side.values.shape, generator=rng), "attn_z")
        for side in (true, false)
    ]
    first, again, other = (iti(*hard, 4, seed=seed).accuracies for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert ((first > 0.2) & (first < 0.95)).any()


def test_all_heads_are_kept_where_there_are_fewer_than_asked_for(tiny: HookedModel) -> None:
    found = iti(*sides_of(tiny, "attn_z"), 4)
    assert sorted(found.heads) == [(layer, head) for layer in range(4) for head in range(4)]
    assert (shift_of(found).view(4, 4, 8).norm(dim=-1) > 0).all()


def test_the_plan_runs_like_any(tiny: HookedModel, tmp_path: Path) -> None:
    found = iti(*sides_of(tiny, "attn_z"), 4, n_kept=6)
    assert_a_plan_like_any(tiny, found.plan, 15.0, tmp_path)


def test_what_cannot_be_fitted_is_refused(tiny: HookedModel) -> None:
    true, false = sides_of(tiny, "attn_z", n_pairs=10)
    with pytest.raises(ActivationError, match=r"multiple of n_heads, .* \(width=32, n_heads=5\)"):
        iti(true, false, 5)
    with pytest.raises(ConfigError, match="n_kept must be at least 1, but got 0"):
        iti(true, false, 4, n_kept=0)
    with pytest.raises(ActivationError, match="must differ at a head, but are equal at all"):
        iti(true, true, 4)
    with pytest.raises(ConfigError, match="of the 10 pairs, but got 9 names of 9 groups"):
        iti(true, false, 4, groups=range(9))
    with pytest.raises(ConfigError, match="of the 10 pairs, but got 10 names of 4 groups"):
        iti(true, false, 4, groups=[n % 4 for n in range(10)])
