"""Two attributions beside each other, and the second view of one: signed sparse coding of the
change on the decoder's directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusion_lens.attribution import Attribution, FeatureEffect, shown_layer
from fusion_lens.dictionaries import Dictionary
from fusion_lens.feature_plots import Labels
from fusion_lens.sparse_coding import sparse_code
from fusion_lens.tables import Section


def compare_features(
    one: Attribution, other: Attribution, labels: Labels | None = None
) -> list[tuple[FeatureEffect, float, float]]:
    """Every feature that either moves, with its effects in both, the largest difference first."""
    effects: list[dict[tuple[str, int], FeatureEffect]] = [
        {(each.dictionary, each.feature): each for each in found.top(None, labels)}
        for found in (one, other)
    ]
    pairs = []
    for key in effects[0] | effects[1]:
        sides = [side.get(key) for side in effects]
        shown = sides[0] or sides[1]
        assert shown is not None
        first, second = (0.0 if side is None else side.effect for side in sides)
        pairs.append((shown, first, second))
    return sorted(pairs, key=lambda pair: -abs(pair[2] - pair[1]))


def difference_table(
    one: Attribution,
    other: Attribution,
    names: tuple[str, str],
    k: int = 20,
    labels: Labels | None = None,
) -> Section:
    """The `k` features whose effects differ most between two plans on the same text."""
    rows = tuple(
        (
            shown_layer(each.layer),
            str(each.feature),
            *(f"{value:+.3f}" for value in (first, second, second - first)),
            each.label,
        )
        for each, first, second in compare_features(one, other, labels)[:k]
    )
    header = ("layer", "feature", *names, "difference", "label")
    return Section(f"effects of two plans ({one.effects[0].kind}), in residual units", header, rows)


def coding_rows(
    found: Attribution,
    dictionaries: Sequence[Dictionary],
    k: int,
    labels: Labels | None = None,
) -> list[dict[str, Any]]:
    """The mean change as a signed sum of `k` directions of each dictionary, refitted together: what
    it could be made of, whatever a dictionary says of its inputs. `error` is what is left of the
    change's norm after each."""
    rows = []
    for dictionary, effects in zip(dictionaries, found.effects, strict=True):
        code = sparse_code(effects.delta, dictionary, k)
        own = (labels or {}).get(effects.card.name, {})
        layers = effects.card.layers
        rows += [
            {
                "dictionary": effects.card.name,
                "layer": layers[0] if len(layers) == 1 else None,
                "feature": feature,
                "weight": weight,
                "error": error,
                "label": own.get(feature, ""),
            }
            for feature, weight, error in zip(code.features, code.weights, code.errors, strict=True)
        ]
    return rows


def coding_table(
    found: Attribution,
    dictionaries: Sequence[Dictionary],
    k: int = 20,
    labels: Labels | None = None,
) -> Section:
    """See `coding_rows`."""
    rows = tuple(
        (
            shown_layer(row["layer"]),
            str(row["feature"]),
            f"{row['weight']:+.3f}",
            f"{row['error']:.2f}",
            row["label"],
        )
        for row in coding_rows(found, dictionaries, k, labels)
    )
    header = ("layer", "feature", "weight", "error left", "label")
    return Section(f"the same change as {k} directions per dictionary", header, rows)
