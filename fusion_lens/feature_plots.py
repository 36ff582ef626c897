"""Plotly figures of attributions: which features, at which layer, at which token, and whether they
do the work.

Blue is more of a feature, vermilion less, grey what is in no feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import plotly.graph_objects as go

from fusion_lens.attribution import Attribution, FeatureEffect, shown_share
from fusion_lens.faithfulness import Faithfulness
from fusion_lens.pictures import LESS, MORE, REST, Figure, centred, error_bars, plain, styled

Labels = Mapping[str, Mapping[int, str]]
"""Label by dictionary's name and feature."""

_LONGEST = 44


def plot_top_features(found: Attribution, k: int = 15, labels: Labels | None = None) -> Figure:
    """The `k` features of the largest effects as signed bars, in residual units, and below them the
    norm of the error, which no feature explains."""
    top = found.top(k, labels)
    names = [feature_name(each) for each in top]
    error = sum(float(each.error.norm()) ** 2 for each in found.effects) ** 0.5
    sizes = [each.effect for each in top]
    figure = go.Figure()
    figure.add_bar(
        x=[*sizes, error],
        y=[*names, "norm of the error, in no feature"],
        orientation="h",
        marker_color=[*(MORE if size > 0 else LESS for size in sizes), REST],
        customdata=[*(each.share for each in top), None],
        hovertemplate="%{y}<br>effect %{x:.3f}<br>share %{customdata:.1%}<extra></extra>",
    )
    kind = found.effects[0].kind
    height = 160 + 26 * (len(top) + 1)
    _titled(figure, f"Features of the {kind} change, effect in residual units", found, height)
    figure.update_xaxes(title="signed effect, |w d|")
    figure.update_yaxes(autorange="reversed", automargin=True)
    columns = ("dictionary", "layer", "feature", "label", "effect", "share")
    rows = tuple(tuple(getattr(each, name) for name in columns) for each in top)
    return Figure("top_features", figure, columns, rows)


def plot_layer_features(found: Attribution, k: int = 12, labels: Labels | None = None) -> Figure:
    """Layer against feature: of a crosscoder the `k` features of the largest effects, each with its
    part in every layer; of SAEs the `k` largest of each layer, by rank."""
    cells = (
        _crosscoder_cells(found, k, labels)
        if any(len(each.card.layers) > 1 for each in found.effects)
        else _ranked_cells(found, k, labels)
    )
    columns = list(dict.fromkeys(column for _, column, _, _ in cells))
    layers = sorted({layer for layer, *_ in cells})
    grid: dict[tuple[int, str], tuple[float, str]] = {
        (layer, column): (effect, name) for layer, column, effect, name in cells
    }
    values = [[grid.get((layer, column), (None, ""))[0] for column in columns] for layer in layers]
    names = [[grid.get((layer, column), (None, ""))[1] for column in columns] for layer in layers]
    figure = go.Figure()
    figure.add_heatmap(
        x=columns,
        y=[f"layer {layer}" for layer in layers],
        z=values,
        customdata=names,
        hovertemplate="%{y}<br>%{customdata}<br>effect %{z:.3f}<extra></extra>",
        **centred(values, "effect"),
    )
    if columns and columns[0].startswith("rank"):
        figure.update_traces(
            text=[[name.split(" ")[1] if name else "" for name in row] for row in names],
            texttemplate="%{text}",
        )
    _titled(figure, "Features by layer", found, 300 + 40 * len(layers))
    figure.update_xaxes(automargin=True, type="category")
    rows = tuple((layer, name, effect) for layer, _, effect, name in cells)
    return Figure("layer_features", figure, ("layer", "feature", "effect"), rows)


def plot_token_features(found: Attribution, k: int = 12, labels: Labels | None = None) -> Figure:
    """Token against feature: the effects of the `k` largest features at every token, in residual
    units; tokens that no mean counts are in brackets."""
    top = found.top(k, labels)
    by_name = {effects.card.name: effects for effects in found.effects}
    values = []
    for each in top:
        effects = by_name[each.dictionary]
        place = effects.place(each.feature)
        assert place is not None
        values.append(effects.token_effects[:, place].tolist())
    tokens = [
        shown if counted else f"({shown})"
        for shown, counted in zip(map(visible, found.str_tokens), found.counted, strict=True)
    ]
    figure = go.Figure()
    figure.add_heatmap(
        x=list(range(len(tokens))),
        y=[feature_name(each) for each in top],
        z=values,
        text=[tokens] * len(top),
        hovertemplate="%{y}<br>token %{text}<br>effect %{z:.3f}<extra></extra>",
        **centred(values, "effect"),
    )
    _titled(figure, "Features by token", found, 240 + 26 * len(top))
    figure.update_xaxes(tickvals=list(range(len(tokens))), ticktext=tokens, tickangle=-60)
    figure.update_xaxes(tickfont_size=11)
    figure.update_yaxes(autorange="reversed", automargin=True)
    rows = tuple(
        (each.dictionary, each.feature, t, found.str_tokens[t], value)
        for each, own in zip(top, values, strict=True)
        for t, value in enumerate(own)
    )
    columns = ("dictionary", "feature", "position", "token", "effect")
    return Figure("token_features", figure, columns, rows)


def plot_faithfulness(measured: Faithfulness, place: str = "question") -> Figure:
    """Nats of the gold answer's log-probability above the unsteered model's against k: the top
    features, random ones at the same norm, and the plan's other parts as lines; 95 % intervals."""
    ks = sorted({gain.k for gain in measured.gains} - {0})
    figure = go.Figure()
    rows: list[tuple[Any, ...]] = []
    curves = (("top", "the k largest features", MORE), ("random", "k random, same norm", LESS))
    for part, title, colour in curves:
        intervals = [measured.interval(part, k, place) for k in ks]
        figure.add_scatter(
            x=ks,
            y=[interval.mean for interval in intervals],
            mode="lines+markers",
            marker_color=colour,
            name=title,
            error_y=error_bars([asdict(interval) for interval in intervals]),
        )
        rows += [
            (part, k, own.mean, own.low, own.high, own.n)
            for k, own in zip(ks, intervals, strict=True)
        ]
    for part, dash in (("full", "solid"), ("without error", "dash"), ("error", "dot")):
        own = measured.interval(part, place=place)
        if own.mean is None:
            continue
        figure.add_scatter(
            x=[ks[0], ks[-1]],
            y=[own.mean] * 2,
            mode="lines",
            line={"color": REST, "dash": dash},
            name={"full": "the whole plan", "error": "its error alone"}.get(part, part),
        )
        rows.append((part, 0, own.mean, own.low, own.high, own.n))
    n = measured.interval("full", place=place).n
    styled(
        figure,
        f"Log-probability of the gold answer after the {place}",
        told=f"n = {n} questions, 95 % cluster bootstrap",
    )
    figure.update_xaxes(title="k, features per dictionary", type="log", tickvals=ks, ticktext=ks)
    figure.update_yaxes(title="nats above unsteered", rangemode="tozero")
    columns = ("part", "k", "mean", "low", "high", "n")
    return Figure(f"faithfulness_{place}", figure, columns, tuple(rows))


def feature_name(each: FeatureEffect) -> str:
    """As in figures, where plotly reads HTML: layer, number and label."""
    head = f"#{each.feature}" if each.layer is None else f"L{each.layer} #{each.feature}"
    label = each.label if len(each.label) <= _LONGEST else each.label[: _LONGEST - 1] + "…"
    return f"{head} {plain(label)}".rstrip()


def visible(token: str) -> str:
    """A token as a tick label: white space is shown, and nothing is HTML."""
    shown = token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·")
    return plain(shown)


def _titled(figure: go.Figure, title: str, found: Attribution, height: int) -> None:
    """With how much of the change is explained, and what is not covered, below the title."""
    text = f"relative error {shown_share(found.relative_error)}, "
    text += f"cosine {shown_share(found.cosine)}; "
    text += f"means over {sum(found.counted)} tokens"
    if found.not_covered:
        text += f"; layers without a dictionary: {', '.join(map(str, found.not_covered))}"
    styled(figure, title, told=text, height=height)


def _crosscoder_cells(
    found: Attribution, k: int, labels: Labels | None
) -> list[tuple[int, str, float, str]]:
    return [
        (layer, feature_name(each), size, feature_name(each))
        for each in found.top(k, labels)
        for layer, size in each.per_layer or _one_layer(each)
    ]


def _one_layer(each: FeatureEffect) -> tuple[tuple[int, float], ...]:
    assert each.layer is not None
    return ((each.layer, each.effect),)


def _ranked_cells(
    found: Attribution, k: int, labels: Labels | None
) -> list[tuple[int, str, float, str]]:
    return [
        (effects.card.layers[0], f"rank {rank}", each.effect, feature_name(each))
        for effects in found.effects
        for rank, each in enumerate(effects.top(k, (labels or {}).get(effects.card.name)), start=1)
    ]
