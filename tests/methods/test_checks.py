from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from fitting import sides_of

from fusion_lens.errors import ActivationError, ContrastError
from fusion_lens.methods.caa import caa
from fusion_lens.methods.control_vectors import control_vectors
from fusion_lens.methods.iti import iti
from fusion_lens.models import HookedModel
from fusion_lens.site_activations import SiteActivations

Sides = tuple[SiteActivations, SiteActivations]
Method = tuple[Callable[..., Any], str, int]

METHODS: dict[str, Method] = {
    "caa": (lambda right, wrong: caa(right, wrong, 1), "resid_post", 2),
    "control_vectors": (control_vectors, "resid_post", 2),
    "iti": (lambda true, false: iti(true, false, 4), "attn_z", 10),
}


def first(side: SiteActivations, n: int) -> SiteActivations:
    return replace(side, values=side.values[:n])


@pytest.fixture(scope="module")
def sides(tiny: HookedModel) -> dict[str, Sides]:
    return {site: sides_of(tiny, site, 10) for site in ("resid_post", "attn_z", "mlp_out")}


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_are_no_pairs_are_refused(sides: dict[str, Sides], name: str) -> None:
    fit, site, least = METHODS[name]
    right, wrong = sides[site]
    with pytest.raises(ContrastError, match="but got 10 right and 9 wrong texts; record both"):
        fit(right, first(wrong, 9))
    with pytest.raises(ContrastError, match=f"at least {least} pairs to learn from, but got"):
        fit(first(right, least - 1), first(wrong, least - 1))
    fit(first(right, least), first(wrong, least))


@pytest.mark.parametrize("name", METHODS)
def test_activations_of_another_site_or_model_are_refused(
    sides: dict[str, Sides], name: str
) -> None:
    fit, site, _ = METHODS[name]
    right, wrong = sides[site]
    with pytest.raises(ActivationError, match=f"both sides must be of one site, but got {site}"):
        fit(right, sides["mlp_out"][1])
    with pytest.raises(
        ActivationError, match=f'activations at {site}, .* record_at.* site="{site}'
    ):
        fit(*sides["mlp_out"])
    other = replace(wrong, model=replace(wrong.model, weights="other"))
    with pytest.raises(ActivationError, match="both sides must come from one model, but"):
        fit(right, other)
