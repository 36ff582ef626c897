"""An attribution -> a table of its features, and lines on what they leave out; two beside each
other; and the second view, signed sparse coding of the change on the decoder's directions."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_lens.attribution import Attribution, FeatureEffect
from fusion_lens.dictionaries import Dictionary
from fusion_lens.feature_plots import Labels
from fusion_lens.report import Section
from fusion_lens.sparse_coding import sparse_code


def feature_table(found: Attribution, k: int = 20, labels: Labels | None = None) -> Section:
    """The `k` features of the largest effects."""
    rows = tuple(
        (
            "all" if each.layer is None else str(each.layer),
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
        f"{float(each.delta.norm()):.2f}, relative error {each.relative_error:.2f}, "
        f"cosine {each.cosine:.2f}" + "".join(f"; {note}" for note in each.card.notes)
        for each in found.effects
    ]
    if len(found.effects) > 1:
        lines.append(f"all: relative error {found.relative_error:.2f}, cosine {found.cosine:.2f}")
    if found.not_covered:
        lines.append(f"not covered: layers {', '.join(map(str, found.not_covered))}")
    return lines


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
            "all" if each.layer is None else str(each.layer),
            str(each.feature),
            *(f"{value:+.3f}" for value in (first, second, second - first)),
            each.label,
        )
        for each, first, second in compare_features(one, other, labels)[:k]
    )
    header = ("layer", "feature", *names, "difference", "label")
    return Section(f"effects of two plans ({one.effects[0].kind}), in residual units", header, rows)


def coding_table(
    found: Attribution,
    dictionaries: Sequence[Dictionary],
    k: int = 20,
    labels: Labels | None = None,
) -> Section:
    """The mean change as a signed sum of `k` directions of each dictionary, refitted together: what
    it could be made of, whatever a dictionary says of its inputs."""
    rows = []
    for dictionary, effects in zip(dictionaries, found.effects, strict=True):
        code = sparse_code(effects.delta, dictionary, k)
        own = (labels or {}).get(effects.card.name, {})
        layers = effects.card.layers
        rows += [
            (
                str(layers[0]) if len(layers) == 1 else "all",
                str(feature),
                f"{weight:+.3f}",
                f"{error:.2f}",
                own.get(feature, ""),
            )
            for feature, weight, error in zip(code.features, code.weights, code.errors, strict=True)
        ]
    header = ("layer", "feature", "weight", "error left", "label")
    return Section(f"the same change as {k} directions per dictionary", header, tuple(rows))
