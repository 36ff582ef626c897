from __future__ import annotations

import pytest
import torch
from scipy.stats import wasserstein_distance

from fusion_lens.methods.wasserstein import wasserstein


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 7), (5, 5), (4, 6), (7, 16), (80, 33)])
def test_the_distance_is_scipys_whatever_the_numbers_of_values(n: int, m: int) -> None:
    x, y = drawn(n, 9, seed=n), 2.0 * drawn(m, 9, seed=100 + m) + 0.5
    y[:, 0] = 0.25  # ties
    found = wasserstein(x, y)
    expected = [wasserstein_distance(x[:, u].numpy(), y[:, u].numpy()) for u in range(9)]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert wasserstein(y, x).tolist() == pytest.approx(found.tolist(), abs=1e-6)


def test_a_toy_is_as_by_hand() -> None:
    """0 and 1 against 0, 0 and 3: a third and a sixth stay, a sixth moves by 1, a third by 2."""
    x, y = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [3.0], [0.0]])
    assert wasserstein(x, y).item() == pytest.approx(1 / 6 + 2 / 3)
    assert wasserstein(x, x.flip(0)).item() == 0.0
    assert wasserstein(x + 2.5, x).item() == pytest.approx(2.5)


@pytest.mark.parametrize(("n", "m"), [(4, 4), (5, 3), (6, 4)])
def test_its_gradient_is_that_of_finite_differences(n: int, m: int) -> None:
    x, y = (drawn(own, 2, seed=own, dtype=torch.float64) for own in (n, m + 10))
    assert torch.autograd.gradcheck(wasserstein, (x.requires_grad_(), y[:m].requires_grad_()))
