"""A change of the residual stream -> the sparse features it consists of, the error kept.

Between two residuals x and y at the same tokens, feature i of a dictionary changes by

    w_i[l] = f_i(y) scale[l](y) - f_i(x) scale[l](x),    contribution  c_i[l] = w_i[l] d_i[l],

and what is in no feature is the offset, `offset(y) - offset(x)`, and the error, `err(y) - err(x)`
with `err(x) = x - decode(encode(x))` as the dictionary itself computes it. Contributions, offset
and error sum to y - x. A bare delta is never encoded: it lies off the distribution that a
dictionary knows, and a code cannot be negative there (Mayne et al. 2024, arXiv 2411.08790).

*Injected*: x is the residual that the steering after a block is given, y what it makes of it.
*Total*: x is the unsteered run, y the steered one, after the steering; with all layers steered most
of the change at a late layer comes from below. Both on the same teacher-forced tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_lens.dictionaries import Card, Dictionary
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import DictionaryError, one_of
from fusion_lens.feature_labels import dashboard_url
from fusion_lens.models import HookedModel, token_texts
from fusion_lens.tables import Section, Shows
from fusion_lens.teacher_forcing import Text, record_streams

KINDS = ("injected", "total")

_ROWS_SHOWN = 10
_SHOWN = ("dictionary", "layer", "feature", "effect", "share", "label")


@dataclass(frozen=True, slots=True)
class FeatureEffect:
    """One feature's part in a change, averaged over tokens.

    `effect` is its signed size in residual units, `share` the part of the change's squared norm
    that it accounts for, `<c_i, delta> / |delta|^2`; None of a change that is 0. `layer` is None
    for a dictionary of several layers, whose parts of the effect are `per_layer`.
    """

    dictionary: str
    layer: int | None
    feature: int
    effect: float
    share: float | None
    label: str = ""
    per_layer: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Effects(Shows):
    """A change in the features of one dictionary.

    `features` are those with a code before or after, in ascending order; `token_effects` their
    signed sizes at every token read, in residual units; the other tensors are means over the tokens
    that count: `weights` w, `directions` d, and the change itself, its offset and its error.
    """

    card: Card
    kind: str
    features: tuple[int, ...]
    token_effects: Float[Tensor, "pos feature"]
    weights: Float[Tensor, "feature layer"]
    directions: Float[Tensor, "feature layer d_model"]
    delta: Float[Tensor, "layer d_model"]
    offset: Float[Tensor, "layer d_model"]
    error: Float[Tensor, "layer d_model"]

    @property
    def contributions(self) -> Float[Tensor, "feature layer d_model"]:
        """c: what each feature adds to the change, in residual units."""
        return self.weights[..., None] * self.directions

    @property
    def effects(self) -> Float[Tensor, " feature"]:
        """The signed size of every contribution."""
        return _signed_sizes(self.weights, self.directions)

    @property
    def shares(self) -> Float[Tensor, " feature"]:
        """`<c_i, delta> / |delta|^2`; with those of offset and error they sum to 1. NaN for a
        change that is 0."""
        return self.contributions.flatten(1) @ self.delta.flatten() / self.delta.square().sum()

    @property
    def explained(self) -> Float[Tensor, "layer d_model"]:
        """Contributions and offset: the change without its error."""
        return self.contributions.sum(dim=0) + self.offset

    @property
    def relative_error(self) -> float | None:
        """|error| / |delta|; None of a change that is 0."""
        return _over(float(self.error.norm()), float(self.delta.norm()))

    @property
    def cosine(self) -> float | None:
        """Between the change and what is explained of it; None where either is 0."""
        norms = float(self.explained.norm()) * float(self.delta.norm())
        return _over(float((self.explained * self.delta).sum()), norms)

    @property
    def gap(self) -> float:
        """|explained + error - delta| / |delta|: rounding, or a dictionary read wrongly."""
        return float((self.explained + self.error - self.delta).norm() / self.delta.norm())

    @property
    def norms(self) -> dict[int, float]:
        """The norm of the change by layer."""
        return dict(zip(self.card.layers, self.delta.norm(dim=-1).tolist(), strict=True))

    def table(
        self, k: int | None = _ROWS_SHOWN, labels: Mapping[int, str] | None = None
    ) -> Section:
        """The `k` features of the largest effects, and how much of the change they leave out."""
        title = f"{self.kind} change; effects in residual units"
        return _feature_table(title, self.top(k, labels), (self.left_out(),))

    def left_out(self) -> str:
        """How many features are active, and how much of the change none explains."""
        shares = f"relative error {shown_share(self.relative_error)}, "
        shares += f"cosine {shown_share(self.cosine)}"
        size = f"{len(self.features)} features active; of a change of norm "
        size += f"{float(self.delta.norm()):.2f}"
        return "; ".join([f"{self.card.name}: {size}, {shares}", *_notes(self.card)])

    def place(self, feature: int) -> int | None:
        """Where a feature is among `features`; None if it has no code."""
        return self.features.index(feature) if feature in self.features else None

    def top(
        self, k: int | None = None, labels: Mapping[int, str] | None = None
    ) -> list[FeatureEffect]:
        """The `k` features of the largest effects, either sign, with labels by feature."""
        effects, shares = self.effects, self.shares
        order = sorted(range(len(self.features)), key=lambda i: (-abs(float(effects[i])), i))
        one = len(self.card.layers) == 1
        sizes = self.weights * self.directions.norm(dim=-1)
        return [
            FeatureEffect(
                self.card.name,
                self.card.layers[0] if one else None,
                self.features[i],
                float(effects[i]),
                None if bool(shares[i].isnan()) else float(shares[i]),
                (labels or {}).get(self.features[i], ""),
                () if one else tuple(zip(self.card.layers, sizes[i].tolist(), strict=True)),
            )
            for i in order[:k]
        ]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Attribution(Shows):
    """A change of the residual stream in the features of one dictionary or several.

    `str_tokens` are the tokens of `Effects.token_effects`, `counted` tells which of them the means
    are taken over. `not_covered` are the layers that no dictionary reads.
    """

    effects: tuple[Effects, ...]
    str_tokens: tuple[str, ...]
    counted: tuple[bool, ...]
    not_covered: tuple[int, ...]

    def top(
        self, k: int | None = None, labels: Mapping[str, Mapping[int, str]] | None = None
    ) -> list[FeatureEffect]:
        """The `k` features of the largest effects over all dictionaries, with labels by
        dictionary's name and feature."""
        found = chain.from_iterable(
            effects.top(k, (labels or {}).get(effects.card.name)) for effects in self.effects
        )
        return sorted(found, key=lambda each: -abs(each.effect))[:k]

    def to_dict(
        self, k: int | None = None, labels: Mapping[str, Mapping[int, str]] | None = None
    ) -> dict[str, Any]:
        """For JSON: the top features, and how much of the change they leave out."""
        return {
            "features": [self._shown(each) for each in self.top(k, labels)],
            "dictionaries": [
                {
                    "dictionary": each.card.name,
                    "layers": list(each.card.layers),
                    "relative_error": each.relative_error,
                    "cosine": each.cosine,
                    "per_layer": each.norms,
                }
                for each in self.effects
            ],
            "relative_error": self.relative_error,
            "cosine": self.cosine,
            "not_covered": list(self.not_covered),
        }

    def table(
        self,
        k: int | None = _ROWS_SHOWN,
        labels: Mapping[str, Mapping[int, str]] | None = None,
    ) -> Section:
        """The `k` features of the largest effects, and how much of the change they leave out."""
        title = f"{self.effects[0].kind} change; effects in residual units, means over "
        title += f"{sum(self.counted)} tokens"
        return _feature_table(title, self.top(k, labels), tuple(self.left_out()))

    def left_out(self) -> list[str]:
        """Per dictionary: how many features are active, and how much of the change none
        explains."""
        lines = [each.left_out() for each in self.effects]
        if len(self.effects) > 1:
            lines.append(
                f"all: relative error {shown_share(self.relative_error)}, "
                f"cosine {shown_share(self.cosine)}"
            )
        if self.not_covered:
            lines.append(f"not covered: layers {', '.join(map(str, self.not_covered))}")
        return lines

    @property
    def relative_error(self) -> float | None:
        """|error| / |delta| over all layers that are covered; None of a change that is 0."""
        return _over(self._norm("error"), self._norm("delta"))

    @property
    def cosine(self) -> float | None:
        """Between the change and what is explained of it, over all layers that are covered; None
        where either is 0."""
        product = sum(float((each.explained * each.delta).sum()) for each in self.effects)
        return _over(product, self._norm("explained") * self._norm("delta"))

    def _shown(self, each: FeatureEffect) -> dict[str, Any]:
        shown: dict[str, Any] = {name: getattr(each, name) for name in _SHOWN}
        if each.per_layer:
            shown["per_layer"] = dict(each.per_layer)
        published = next(
            effects.card.neuronpedia_id
            for effects in self.effects
            if effects.card.name == each.dictionary
        )
        if published is not None:
            shown["url"] = dashboard_url(published, each.feature)
        return shown

    def _norm(self, name: str) -> float:
        return math.hypot(*(float(getattr(each, name).norm()) for each in self.effects))


def effects_between(
    dictionary: Dictionary,
    x: Float[Tensor, "pos layer d_model"],
    y: Float[Tensor, "pos layer d_model"],
    counted: Bool[Tensor, " pos"] | None = None,
    *,
    kind: str = "injected",
) -> Effects:
    """The change from x to y, residuals after the blocks the dictionary reads, at the same tokens.

    `counted` are the tokens that means are taken over (None: all).

    Raises:
        DictionaryError: if x or y do not fit the dictionary, or no token counts.
    """
    if counted is None:
        counted = torch.ones(len(x), dtype=torch.bool)
    if not bool(counted.any()):
        raise DictionaryError("there must be a token to take a mean over, but got none.")
    before, after = dictionary.encode(x), dictionary.encode(y)
    active = ((before.codes != 0) | (after.codes != 0)).any(dim=0).nonzero()[:, 0]
    weights = (
        after.codes[:, active, None] * after.scale[:, None]
        - before.codes[:, active, None] * before.scale[:, None]
    )
    directions = dictionary.decoder[:, active].transpose(0, 1)
    delta = dictionary.to_basis(y) - dictionary.to_basis(x)
    error = delta - (dictionary.reconstruct(y) - dictionary.reconstruct(x))

    def mean(values: Tensor) -> Tensor:
        return values[counted.to(values.device)].mean(dim=0).cpu()

    return Effects(
        card=dictionary.card,
        kind=one_of("kind", kind, KINDS),
        features=tuple(active.tolist()),
        token_effects=_signed_sizes(weights, directions).cpu(),
        weights=mean(weights),
        directions=directions.cpu(),
        delta=mean(delta),
        offset=mean(after.offset - before.offset),
        error=mean(error),
    )


def attribute(
    model: HookedModel,
    dictionaries: Sequence[Dictionary],
    texts: Sequence[Text],
    *,
    kind: str = "injected",
    log: EngineLog | None = None,
) -> list[Attribution]:
    """What each text's plan changes, in the features of every dictionary.

    The tokens read are all but special ones; those that count are the positions whose logits write
    what follows the prompt, or, where nothing does, all that are read. The dictionaries must fit
    the model (`dictionaries.fit_to_model`).

    Raises:
        DictionaryError: if two dictionaries read one layer or have one name, or one has another
            width.
        PlanError: if a plan belongs to another model, or recomputes its mean.
    """
    one_of("kind", kind, KINDS)
    layers = [layer for dictionary in dictionaries for layer in dictionary.card.layers]
    if len(set(layers)) != len(layers):
        raise DictionaryError(
            f"every layer must be read by one dictionary at most, but got {sorted(layers)}."
        )
    names = [dictionary.card.name for dictionary in dictionaries]
    if len(set(names)) != len(names):
        # a feature is known by the name of its dictionary
        raise DictionaryError(
            f"dictionaries must have different names, but got {', '.join(names)}; rename a folder."
        )
    steered = record_streams(model, texts, log=log)
    if kind == "injected":
        pairs = [(streams.entering, streams.leaving) for streams in steered]
    else:
        plain = record_streams(model, [replace(text, plan=None) for text in texts], log=log)
        pairs = [(a.leaving, b.leaving) for a, b in zip(plain, steered, strict=True)]
    n_layers = int(model.cfg.n_layers)
    not_covered = tuple(layer for layer in range(n_layers) if layer not in layers)
    made = []
    for text, (x, y) in zip(texts, pairs, strict=True):
        read = [t for t in range(len(text.tokens)) if t not in text.prompt.special]
        tokens = token_texts(model, text.tokens)
        writing = set(text.writing) or set(read)
        counted = torch.tensor([t in writing for t in read])
        made.append(
            Attribution(
                effects=tuple(
                    effects_between(
                        dictionary,
                        _at(x, dictionary, read),
                        _at(y, dictionary, read),
                        counted,
                        kind=kind,
                    )
                    for dictionary in dictionaries
                ),
                str_tokens=tuple(tokens[t] for t in read),
                counted=tuple(counted.tolist()),
                not_covered=not_covered,
            )
        )
    return made


def shown_layer(layer: int | None) -> str:
    """A feature's layer; "all" for one of a dictionary of several."""
    return "all" if layer is None else str(layer)


def shown_share(value: float | None) -> str:
    """With two decimals; "-" for a change that is 0."""
    return "-" if value is None else f"{value:.2f}"


def _feature_table(title: str, top: Sequence[FeatureEffect], notes: tuple[str, ...]) -> Section:
    rows = tuple(
        (
            shown_layer(each.layer),
            str(each.feature),
            f"{each.effect:+.3f}",
            "-" if each.share is None else f"{each.share:+.1%}",
            each.label,
        )
        for each in top
    )
    return Section(title, ("layer", "feature", "effect", "share", "label"), rows, notes)


def _notes(card: Card) -> list[str]:
    if card.neuronpedia_id is None:
        return list(card.notes)
    return [*card.notes, f"its features' pages: {dashboard_url(card.neuronpedia_id, 0)[:-1]}N"]


def _over(above: float, below: float) -> float | None:
    return above / below if below else None


def _at(
    stream: Float[Tensor, "all_layers all_pos d_model"], dictionary: Dictionary, read: list[int]
) -> Float[Tensor, "pos layer d_model"]:
    return stream[list(dictionary.card.layers)][:, read].transpose(0, 1)


def _signed_sizes(
    weights: Float[Tensor, "*pos feature layer"], directions: Float[Tensor, "feature layer d_model"]
) -> Float[Tensor, "*pos feature"]:
    """|c_i| with the sign of its weights."""
    sized = weights * directions.norm(dim=-1)
    signed: Tensor = sized.norm(dim=-1) * sized.sum(dim=-1).sign()
    return signed
