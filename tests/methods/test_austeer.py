from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import assert_a_plan_like_any
from kinds import SITES
from torch import Tensor
from toy_units import TOY, differences_of

from fusion_lens.contrast_texts import pair_texts
from fusion_lens.contrasts import Pair
from fusion_lens.errors import ActivationError, ConfigError, ContrastError
from fusion_lens.identity import identify
from fusion_lens.methods.austeer import ALPHA_HIGH, ALPHA_LOW, austeer, momenta
from fusion_lens.models import HookedModel
from fusion_lens.plans import Affine
from fusion_lens.site_activations import SiteActivations, record_at
from fusion_lens.units import Momenta, ranking_by_mean

PAIRS = [
    Pair("a", "Who wrote the red book?", "\nAda Lovelace", "\nTom Harris"),
    Pair("b", "When was Tom born?", "\n3 May 1901", "\n4 June 1902"),
    Pair("c", "Where is the harbour?", " in the quiet winter.", " over the lazy dog."),
    Pair("d", "Who was born?", " Tom was born.", " The fox jumps."),
    Pair("e", "The quick", " brown fox", " red book"),
]


def recorded(model: HookedModel, site: str) -> tuple[SiteActivations, SiteActivations]:
    right, wrong = pair_texts(model, PAIRS)
    return record_at(model, right, site), record_at(model, wrong, site)


def toy(model: HookedModel, units: Mapping[tuple[int, int], list[float]]) -> Momenta:
    differences = differences_of(units)
    base = torch.full_like(differences, 2.0)
    sides = (SiteActivations(x, "resid_post", identify(model)) for x in (base + differences, base))
    return momenta(*sides)


def test_momenta_are_shares_of_pairs_and_zeros_count_for_neither(tiny: HookedModel) -> None:
    found = toy(tiny, TOY)
    shares = {place: (found.r_positive[place], found.r_negative[place]) for place in TOY}
    assert shares == {
        (3, 7): (1.0, 0.0),
        (1, 5): (0.0, 1.0),
        (1, 2): (1.0, 0.0),
        (0, 0): (0.5, 0.25),
        (2, 9): (0.25, 0.5),
        (2, 3): (0.5, 0.5),
    }
    assert found.mean[3, 7] == 2.5
    assert found.mean[2, 9] == 1.5
    assert found.score[2, 9] == 0.5
    assert float(found.score.sum()) == 4.5
    assert found.n == 4


def test_a_kept_unit_is_scaled_by_the_larger_share_with_its_sign(tiny: HookedModel) -> None:
    found = toy(tiny, TOY)
    (step,) = (austeer(found, 6) * 10.0).steps
    assert isinstance(step, Affine)
    assert step.move.scale is not None
    scales = {tuple(p): float(step.move.scale[tuple(p)]) for p in step.scale.nonzero().tolist()}
    # r+ and r- of (2, 3) are equal, which counts as positive
    assert scales == {
        (1, 2): 10.0,
        (1, 5): -10.0,
        (3, 7): 10.0,
        (0, 0): 5.0,
        (2, 3): 5.0,
        (2, 9): -5.0,
    }
    assert not bool(step.shift.any())
    assert (step.site, step.positions) == ("resid_post", "all")
    chosen = austeer(found, 1, ranking=ranking_by_mean(found), positions="prompt").steps[0]
    assert isinstance(chosen, Affine)
    assert (chosen.scale.nonzero().tolist(), chosen.positions) == ([[1, 5]], "prompt")


def by_numpy(right: Tensor, wrong: Tensor, k: int) -> np.ndarray:
    """The scale of every unit, counted one by one from the formulas of docs/method.md."""
    x, y = right.numpy().astype(np.float64), wrong.numpy().astype(np.float64)
    n, n_layers, width = x.shape
    up, down = np.zeros((n_layers, width)), np.zeros((n_layers, width))
    for j in range(n):
        for place in np.ndindex(n_layers, width):
            up[place] += x[j][place] > y[j][place]
            down[place] += x[j][place] < y[j][place]
    places = sorted(np.ndindex(n_layers, width), key=lambda p: (-max(up[p], down[p]), p))
    scale = np.zeros((n_layers, width))
    for p in places[:k]:
        scale[p] = up[p] / n if up[p] >= down[p] else -down[p] / n
    return scale


@pytest.mark.parametrize("k", [1, 40, 4 * 32])
@pytest.mark.parametrize("site", SITES)
def test_plans_are_those_counted_one_by_one(tiny: HookedModel, site: str, k: int) -> None:
    right, wrong = recorded(tiny, site)
    (step,) = austeer(momenta(right, wrong), k).steps
    assert isinstance(step, Affine)
    expected = by_numpy(right.values, wrong.values, k)
    np.testing.assert_allclose(step.scale.numpy(), expected, atol=1e-5)
    assert step.site == site
    assert 0 < np.count_nonzero(expected) <= k


@pytest.mark.parametrize("site", SITES)
def test_the_plan_keeps_what_plans_keep(tiny: HookedModel, site: str, tmp_path: Path) -> None:
    assert_a_plan_like_any(tiny, austeer(momenta(*recorded(tiny, site)), 20), 1.0, tmp_path)
    assert (ALPHA_LOW, ALPHA_HIGH) == (1.0, 100.0)


REFUSED: dict[str, tuple[Callable[[HookedModel], object], type[Exception], str]] = {
    "one pair": (
        lambda m: momenta(*(some_rows(side, 1) for side in recorded(m, "resid_post"))),
        ContrastError,
        "at least 2 pairs to learn from, but got 1",
    ),
    "unequal": (
        lambda m: momenta(recorded(m, "mlp_out")[0], some_rows(recorded(m, "mlp_out")[1], 3)),
        ContrastError,
        "must have its wrong one, but got 5 right and 3 wrong",
    ),
    "sites": (
        lambda m: momenta(recorded(m, "mlp_out")[0], recorded(m, "resid_post")[1]),
        ActivationError,
        "must be of one site, but got mlp_out of 32 and resid_post",
    ),
    "no unit": (lambda m: austeer(toy(m, {}), 0), ConfigError, "1 <= k <= 128.* but got 0"),
    "too many": (lambda m: austeer(toy(m, {}), 129), ConfigError, "1 <= k <= 128.* but got 129"),
    "positions": (
        lambda m: austeer(toy(m, {}), 3, positions="last"),
        ConfigError,
        "positions must be one of all",
    ),
}


def some_rows(side: SiteActivations, n: int) -> SiteActivations:
    return replace(side, values=side.values[:n])


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_counted_is_refused(tiny: HookedModel, case: str) -> None:
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make(tiny)
