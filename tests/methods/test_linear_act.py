from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import strong_plan
from fitting import assert_a_plan_like_any
from kinds import SITES
from torch import Tensor

from fusion_lens.contrast_texts import example_texts
from fusion_lens.contrasts import Example
from fusion_lens.errors import ConfigError, ContrastError, PlanError
from fusion_lens.methods.linear_act import affine_map, linear_act
from fusion_lens.models import HookedModel, site_hook
from fusion_lens.plans import Affine
from fusion_lens.site_activations import record_at
from fusion_lens.teacher_forcing import Text

SOURCES = [
    Example("a", "source", "\nAda Lovelace wrote it.", "Who wrote the red book?"),
    Example("b", "source", "\n3 May 1901 in winter", "When was Tom born?"),
    Example("c", "source", "The harbour is quiet in winter."),
    Example("d", "source", " was born on 3 May.", "Tom"),
    Example("e", "source", "The quick brown fox jumps over the lazy dog."),
]
TARGETS = [
    Example("f", "target", "\nIt was in 1843.", "Who wrote the book?"),
    Example("g", "target", "Explanation: the dog is lazy in the harbour."),
    Example("h", "target", " jumps over Ada Lovelace", "The red fox"),
]


def texts_of(model: HookedModel) -> tuple[list[Text], list[Text]]:
    return example_texts(model, SOURCES), example_texts(model, TARGETS)


def test_a_map_fits_sorted_values_whatever_their_order() -> None:
    source = torch.tensor([[2.0, 5.0, 0.0], [0.0, 5.0, 1.0], [1.0, 5.0, 5.0]])
    target = torch.tensor([[10.0, 1.0, 1.0], [14.0, 2.0, 1.0], [12.0, 6.0, 1.0]])
    omega, b, low, high = affine_map(source, target)
    # doubled and shifted; constant in the source: shifted alone; constant in the target: all alike
    assert omega.tolist() == [2.0, 1.0, 0.0]
    assert b.tolist() == [10.0, -2.0, 1.0]
    assert low.tolist() == [0.0, 5.0, 0.0]
    assert high.tolist() == [2.0, 5.0, 5.0]


def test_of_unequal_sides_omega_is_of_quantiles_and_b_takes_mean_to_mean() -> None:
    source = torch.tensor([[0.0], [1.0], [2.0], [3.0], [10.0]])
    target = torch.tensor([[4.0], [0.0], [2.0]])
    omega, b, low, high = affine_map(source, target)
    # quantiles of the source at 0, 1/2 and 1: 0, 2, 10
    x, y = np.array([-4.0, -2.0, 6.0]), np.array([-2.0, 0.0, 2.0])
    assert float(omega) == pytest.approx(x @ y / (x @ x))
    assert float(b) == pytest.approx(2.0 - float(omega) * 3.2)
    assert (float(low), float(high)) == (0.0, 10.0)


def by_numpy(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, ...]:
    """The formulas of docs/method.md, one unit after the other."""
    n = min(len(source), len(target))
    maps = []
    for x, y in zip(source.T.astype(np.float64), target.T.astype(np.float64), strict=True):
        own_x, own_y = (np.quantile(side, np.linspace(0, 1, n)) for side in (x, y))
        own_x, own_y = own_x - own_x.mean(), own_y - own_y.mean()
        omega = (own_x * own_y).sum() / (own_x**2).sum()
        maps.append((omega, y.mean() - omega * x.mean(), x.min(), x.max()))
    return tuple(np.array(column) for column in zip(*maps, strict=True))


@pytest.mark.parametrize(("n", "m"), [(2, 2), (9, 9), (9, 4), (5, 12), (17, 16)])
def test_a_map_is_that_of_the_formulas(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n * m)
    source = torch.randn(n, 12, generator=generator) * 3 + 1
    target = torch.randn(m, 12, generator=generator) - 2
    expected = by_numpy(source.numpy(), target.numpy())
    for mine, theirs in zip(affine_map(source, target), expected, strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-5, rtol=1e-5)


def by_hand(model: Any, site: str, tokens: str) -> list[tuple[np.ndarray, ...]]:
    """Layer by layer on TransformerLens' own hooks, text after text, each map applied by NumPy."""
    maps: list[tuple[np.ndarray, ...]] = []

    def pooled(text: Text, layer: int, n_mapped: int) -> np.ndarray:
        kept: dict[int, np.ndarray] = {}

        def at(own: int, x: Tensor, hook: object) -> Tensor:
            rows = x.detach().flatten(2)[0].numpy().copy()
            kept[own] = rows[-1] if tokens == "last" else rows[1:].mean(axis=0)
            if own < n_mapped:
                omega, b, low, high = maps[own]
                inside = (rows >= low) & (rows <= high)
                inside[0] = False  # the special token
                rows = np.where(inside, omega * rows + b, rows)
            return torch.tensor(rows, dtype=x.dtype).view(x.shape)

        hooks = [(site_hook(model, site, own), partial(at, own)) for own in range(layer + 1)]
        model.run_with_hooks(torch.tensor([text.tokens]), fwd_hooks=hooks)
        return kept[layer]

    sources, targets = texts_of(model)
    for layer in range(model.cfg.n_layers):
        x = np.stack([pooled(text, layer, layer) for text in sources])
        y = np.stack([pooled(text, layer, 0) for text in targets])
        maps.append(by_numpy(x, y))
    return maps


@pytest.mark.parametrize("tokens", ["mean", "last"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.slow
def test_every_layer_is_fitted_on_sources_that_the_layers_below_have_mapped(
    float64: HookedModel, site: str, tokens: str
) -> None:
    # in float32 a token may lie so close to a bound that it rounds to its other side
    (step,) = linear_act(float64, *texts_of(float64), site=site, tokens=tokens).steps
    assert isinstance(step, Affine)
    for layer, (omega, b, low, high) in enumerate(by_hand(float64, site, tokens)):
        for mine, theirs in (
            (step.scale[layer] + 1, omega),
            (step.shift[layer], b),
            (step.low[layer], low),
            (step.high[layer], high),
        ):
            np.testing.assert_allclose(mine.numpy(), theirs, atol=1e-8, rtol=1e-8)


def test_one_pass_is_made_over_the_targets_and_one_a_layer_over_the_sources(
    tiny: HookedModel,
) -> None:
    seen: list[int] = []
    sources, targets = texts_of(tiny)
    told: list[tuple[str, int, int]] = []

    def note(x: Tensor, hook: object) -> None:
        seen.append(len(x))

    with tiny.hooks(fwd_hooks=[("hook_embed", note)]):
        linear_act(
            tiny,
            sources[1:3],
            targets[:2],
            executor="hooks",
            progress=lambda *stage: told.append(stage),
        )
    # two texts of two shapes on either side
    assert len(seen) == 5 * 2
    assert told == [("layers mapped", n, 4) for n in (1, 2, 3, 4)]


def test_texts_carried_to_themselves_are_left_alone(tiny: HookedModel) -> None:
    sources, _ = texts_of(tiny)
    (step,) = linear_act(tiny, sources, sources).steps
    assert isinstance(step, Affine)
    assert float(step.scale.abs().max()) == 0.0
    assert float(step.shift.abs().max()) == 0.0


def test_mapped_sources_have_the_targets_mean_at_the_last_layer(tiny: HookedModel) -> None:
    sources, targets = texts_of(tiny)
    plan = linear_act(tiny, sources, targets, tokens="last")
    (step,) = plan.steps
    assert isinstance(step, Affine)
    moved = record_at(tiny, [replace(text, plan=plan) for text in sources]).values[:, -1]
    after = moved + step.scale[-1] * moved + step.shift[-1]
    wanted = record_at(tiny, targets).values[:, -1].mean(dim=0)
    torch.testing.assert_close(after.mean(dim=0), wanted, atol=1e-5, rtol=1e-5)
    plain = record_at(tiny, sources).values[:, -1].mean(dim=0)
    assert float((plain - wanted).norm()) > 1.0


def test_a_strength_goes_that_part_of_the_way(tiny: HookedModel) -> None:
    (step,) = (linear_act(tiny, *texts_of(tiny)) * 0.25).steps
    assert isinstance(step, Affine)
    x = (step.low + step.high) / 2
    move = step.move
    assert move.scale is not None
    mapped = (step.scale + 1) * x + step.shift
    torch.testing.assert_close(x + move.scale * x + move.shift, 0.25 * mapped + 0.75 * x)


@pytest.mark.parametrize("site", SITES)
def test_the_plan_keeps_what_plans_keep(tiny: HookedModel, site: str, tmp_path: Path) -> None:
    assert_a_plan_like_any(tiny, linear_act(tiny, *texts_of(tiny), site=site), 1.0, tmp_path)


REFUSED: dict[str, tuple[Callable[[HookedModel, Any, Any], object], type[Exception], str]] = {
    "one target": (
        lambda m, s, t: linear_act(m, s, t[:1]),
        ContrastError,
        "at least 2 texts of either side, but got 5 sources and 1 targets",
    ),
    "a plan": (
        lambda m, s, t: linear_act(m, [s[0], replace(s[1], plan=strong_plan(m))], t),
        PlanError,
        "must be unsteered .*but 'When was Tom born\\?' has a plan",
    ),
    "site": (lambda m, s, t: linear_act(m, s, t, site="mlp"), ConfigError, "site must be one of"),
    "tokens": (
        lambda m, s, t: linear_act(m, s, t, tokens="first"),
        ConfigError,
        "tokens must be one of",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_fitted_is_refused(tiny: HookedModel, case: str) -> None:
    make, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make(tiny, *texts_of(tiny))
