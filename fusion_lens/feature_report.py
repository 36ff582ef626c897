"""An attribution -> a table of its features, and lines on what they leave out; two beside each
other; and the second view, signed sparse coding of the change on the decoder's directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fusion_lens.attribution import Attribution, FeatureEffect, shown_share
from fusion_lens.dictionaries import Card, Dictionary
from fusion_lens.feature_labels import dashboard_url
from fusion_lens.feature_plots import Labels
from fusion_lens.report import Section
from fusion_lens.sparse_coding import sparse_code


def feature_table(found: Attribution, k: int = 20, labels: Labels | None = None) -> Section:
    """The `k` features of the largest effects."""
    rows = tuple(
        (
            _layer(each.layer),
            str(each.feature),
            f"{each.effect:+.3f}",
            "-" if each.share is None else f"{each.share:+.1%}",
            each.label,
        )
        for each in found.top(k, labels)
    )
    title = f"{found.effects[0].kind} change; effects in residual units, means over "
    title += f"{sum(found.counted)} tokens"
    return Section(title, ("layer", "feature", "effect", "share", "label"), rows)


def left_out_lines(found: Attribution) -> list[str]:
    """Per dictionary: how many features are active, and how much of the change none explains."""
    lines = [
        f"{each.card.name}: {len(each.features)} features active; of a change of norm "
        f"{float(each.delta.norm()):.2f}, relative error {shown_share(each.relative_error)}, "
        f"cosine {shown_share(each.cosine)}" + "".join(f"; {note}" for note in _notes(each.card))
        for each in found.effects
    ]
    if len(found.effects) > 1:
        lines.append(
            f"all: relative error {shown_share(found.relative_error)}, "
            f"cosine {shown_share(found.cosine)}"
        )
    if found.not_covered:
        lines.append(f"not covered: layers {', '.join(map(str, found.not_covered))}")
    return lines


def _layer(layer: int | None) -> str:
    return "all" if layer is None else str(layer)


def _notes(card: Card) -> list[str]:
    if card.neuronpedia_id is None:
        return list(card.notes)
    return [*card.notes, f"its features' pages: {dashboard_url(card.neuronpedia_id, 0)[:-1]}N"]


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
            _layer(each.layer),
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
            _layer(row["layer"]),
            str(row["feature"]),
            f"{row['weight']:+.3f}",
            f"{row['error']:.2f}",
            row["label"],
        )
        for row in coding_rows(found, dictionaries, k, labels)
    )
    header = ("layer", "feature", "weight", "error left", "label")
    return Section(f"the same change as {k} directions per dictionary", header, rows)
