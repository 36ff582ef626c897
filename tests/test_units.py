from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import deltas_of
from toy_units import TOY, differences_of

from fusion_lens.controls import with_vectors
from fusion_lens.errors import ActivationError, ConfigError, ContrastError
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel
from fusion_lens.plans import make_plan
from fusion_lens.units import (
    Momenta,
    consistent,
    count_momenta,
    random_ranking,
    ranking_by_mean,
    unit_mask,
)


def toy(model: HookedModel, units: Mapping[tuple[int, int], list[float]]) -> Momenta:
    return count_momenta(differences_of(units), "resid_post", identify(model))


def test_units_are_ranked_by_score_then_layer_then_dimension(tiny: HookedModel) -> None:
    ranking = toy(tiny, TOY).ranking
    head = [[1, 2], [1, 5], [3, 7], [0, 0], [2, 3], [2, 9], [0, 1], [0, 2]]
    assert ranking[:8].tolist() == head
    assert ranking[-1].tolist() == [3, 31]
    assert len({tuple(place) for place in ranking.tolist()}) == 4 * 32


def test_controls_rank_all_units_by_mean_difference_or_by_chance(tiny: HookedModel) -> None:
    found = toy(tiny, TOY)
    assert ranking_by_mean(found)[:4].tolist() == [[1, 5], [3, 7], [2, 9], [1, 2]]
    one, same, other = (random_ranking(found.shape, seed) for seed in (0, 0, 1))
    assert found.shape == (4, 32)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    for ranking in (one, other, ranking_by_mean(found)):
        assert {tuple(place) for place in ranking.tolist()} == set(np.ndindex(4, 32))


def test_the_first_k_units_of_a_ranking_are_the_mask(tiny: HookedModel) -> None:
    ranking = toy(tiny, TOY).ranking
    mask = unit_mask(ranking, 3, (4, 32))
    assert mask.nonzero().tolist() == [[1, 2], [1, 5], [3, 7]]
    assert bool(unit_mask(ranking, 128, (4, 32)).all())


def test_counts_add_up_and_a_question_is_taken_away_again(tiny: HookedModel) -> None:
    base = deltas_of(tiny)
    generator = torch.Generator().manual_seed(0)
    many = [
        with_vectors(base, torch.randn(base.vectors.shape, generator=generator)) for _ in range(7)
    ]
    everyone = consistent(many)
    for i, own in enumerate(many):
        others = consistent(many[:i] + many[i + 1 :])
        left = everyone - consistent([own])
        assert left.n == 6
        assert torch.equal(left.n_positive, others.n_positive)
        assert torch.equal(left.n_negative, others.n_negative)
        assert torch.equal(left.ranking, others.ranking)
        torch.testing.assert_close(left.mean, others.mean)
    halves = consistent(many[:3]) + consistent(many[3:])
    assert torch.equal(halves.n_positive, everyone.n_positive)
    assert halves.n == 7


def test_what_others_agree_on_is_a_mask_of_a_step(tiny: HookedModel) -> None:
    base = deltas_of(tiny)
    signs = torch.ones(5, 4, 32)
    signs[0, :, ::2] = -1.0
    others = [with_vectors(base, base.vectors.abs() * own) for own in signs]
    found = consistent(others)
    assert (found.site, found.model) == ("resid_post", identify(tiny))
    mask = unit_mask(found.ranking, 4 * 16, (4, 32))
    assert bool(mask[:, 1::2].all())
    plan = make_plan(base, 1.0, units=mask)
    assert torch.equal(plan.shift_at("completion"), base.vectors * mask)


def test_a_mask_holds_the_first_units_of_a_ranking() -> None:
    ranking = torch.tensor([[1, 2], [0, 0], [1, 0]])
    assert unit_mask(ranking, 2, (2, 3)).tolist() == [[True, False, False], [False, False, True]]
    for k in (0, 4):
        with pytest.raises(ConfigError, match=rf"1 <= k <= 3 units must hold, but got {k}"):
            unit_mask(ranking, k, (2, 3))
    with pytest.raises(ConfigError, match=r"units must lie within \(2, 2\), but got \[1, 2\]"):
        unit_mask(ranking, 1, (2, 2))
    assert unit_mask(ranking[1:], 1, (2, 2)).tolist() == [[True, False], [False, False]]


def test_what_cannot_be_counted_is_refused(tiny: HookedModel) -> None:
    found, one = toy(tiny, TOY), consistent([deltas_of(tiny)])
    with pytest.raises(ContrastError, match="at least one question's deltas"):
        consistent([])
    with pytest.raises(ContrastError, match="at least 2 pairs to be compared, but are of 1"):
        _ = one.ranking
    with pytest.raises(ContrastError, match=r"counts must be in 0 to 3.*that were counted in"):
        _ = toy(tiny, {}) - one
    with pytest.raises(ActivationError, match="must be of one site, but got resid_post and mlp"):
        _ = found + replace(found, site="mlp_out")
    with pytest.raises(ActivationError, match="momenta must come from one model"):
        _ = found + replace(found, model=replace(found.model, weights="0" * 64))
