"""An attribution -> a table of its features, and lines on what they leave out."""

from __future__ import annotations

from fusion_lens.attribution import Attribution
from fusion_lens.feature_plots import Labels
from fusion_lens.report import Section


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
