from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import assert_a_plan_like_any, sides_of, toy

from fusion_lens.errors import PlanError
from fusion_lens.methods.caa import caa
from fusion_lens.models import HookedModel
from fusion_lens.plans import Segment


def test_the_vector_is_the_mean_difference_of_the_pairs() -> None:
    right = toy([[[1.0, 2.0], [5.0, 0.0]], [[3.0, 0.0], [1.0, 4.0]]])
    wrong = toy([[[0.0, 0.0], [1.0, 1.0]], [[1.0, -2.0], [1.0, 1.0]]])
    (step,) = caa(right, wrong, 1).steps
    assert step.shift.tolist() == [[0.0, 0.0], [2.0, 1.0]]
    assert step.deltas.reference.tolist() == [[2.0, 1.0], [3.0, 2.0]]
    assert step.deltas.base.tolist() == [[0.5, -1.0], [1.0, 1.0]]
    assert (step.segments, step.positions) == ((Segment("layer_1", 1, 2),), "completion")


def test_it_is_what_numpy_makes_of_the_formula(tiny: HookedModel) -> None:
    right, wrong = sides_of(tiny)
    (step,) = caa(right, wrong, 2, positions=3).steps
    pairs = [
        (np.asarray(r, dtype=np.float64), np.asarray(w))
        for r, w in zip(right.values, wrong.values, strict=True)
    ]
    expected = sum(r[2] - w[2] for r, w in pairs) / len(pairs)
    assert np.linalg.norm(expected) > 0.1
    np.testing.assert_allclose(step.shift[2].numpy(), expected, atol=1e-5)
    assert step.shift[[0, 1, 3]].count_nonzero() == 0
    assert step.positions == 3


def test_the_order_of_the_pairs_and_a_float64_model_change_nothing(tiny: HookedModel) -> None:
    right, wrong = sides_of(tiny)
    turned = [toy(side.values.flip(0).double()) for side in (right, wrong)]
    expected = caa(right, wrong, 1).steps[0].shift
    torch.testing.assert_close(caa(*turned, 1).steps[0].shift, expected, atol=1e-6, rtol=0)


def test_the_plan_runs_like_any(tiny: HookedModel, tmp_path: Path) -> None:
    assert_a_plan_like_any(tiny, caa(*sides_of(tiny), 1), 2.0, tmp_path)


@pytest.mark.parametrize("layer", [-1, 4])
def test_a_layer_that_is_not_there_is_refused(tiny: HookedModel, layer: int) -> None:
    with pytest.raises(PlanError, match=rf"but got \(layer={layer}, n_layers=4\)"):
        caa(*sides_of(tiny, n_pairs=2), layer)
