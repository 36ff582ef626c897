"""What a user calls a dictionary -> dictionaries that fit a model, with what their features are
called.

`atlas-sae` (one for every layer) and `atlas-crosscoder` are shipped; else a folder that sae-lens
or `save_crosscoder` wrote, or RELEASE/ID as sae-lens names it. Labels lie beside a dictionary as
`labels.json`; those of published SAEs are Neuronpedia's, where it can be asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusion_lens.atlas import DICTIONARIES
from fusion_lens.attribution import Attribution, FeatureEffect, attribute
from fusion_lens.crosscoder_files import WEIGHTS as CROSSCODER_WEIGHTS
from fusion_lens.crosscoder_files import load_crosscoder
from fusion_lens.dictionaries import Dictionary, fit_to_model
from fusion_lens.errors import InputFileError
from fusion_lens.feature_labels import published_labels
from fusion_lens.identity import weights_digest
from fusion_lens.models import HookedModel
from fusion_lens.saes import load_sae
from fusion_lens.teacher_forcing import Text
from fusion_lens.typed_json import parsed

SHIPPED = {"atlas-sae": "sae_layer_*", "atlas-crosscoder": "crosscoder"}
LABELS = "labels.json"


@dataclass(frozen=True, slots=True)
class Label:
    """What a feature is called; `kind` says what sort of thing that is, `precise` whether it holds
    on text it was not found on."""

    text: str
    kind: str
    precise: bool


@dataclass(frozen=True, slots=True)
class Shelved:
    """A dictionary that fits the model, and the labels of its features where there are any."""

    dictionary: Dictionary
    labels: Mapping[int, Label]

    @property
    def texts(self) -> dict[int, str]:
        """Labels as they are shown: one that does not hold elsewhere ends in "?"."""
        return {
            feature: label.text if label.precise else f"{label.text}?"
            for feature, label in self.labels.items()
        }


def _tensors(of: Any) -> list[Tensor]:
    """All that a dictionary holds, wherever it does."""
    if isinstance(of, Tensor):
        return [of]
    if isinstance(of, torch.nn.Module):
        return list(of.state_dict().values())
    if is_dataclass(of):
        return [own for each in fields(of) for own in _tensors(getattr(of, each.name))]
    return []


def open_dictionaries(names: Sequence[str], model: HookedModel) -> list[Shelved]:
    """The dictionaries of these names, made to read this model's residuals.

    Raises:
        InputFileError: if a file is missing or damaged.
        DictionaryError: if one is no dictionary of a residual stream, or does not fit the model.
        MissingExtraError: if sae-lens is needed and not installed.
    """
    shelved = []
    for name in names:
        if name in SHIPPED:
            folders = sorted(DICTIONARIES.glob(SHIPPED[name]))
            shelved += [_opened(folder, model) for folder in folders]
        elif Path(name).exists():
            shelved.append(_opened(Path(name), model))
        else:
            shelved.append(Shelved(fit_to_model(load_sae(name), model), {}))
    return shelved


def labels_of(shelved: Sequence[Shelved], found: Attribution, k: int) -> dict[str, dict[int, str]]:
    """What the `k` largest features of each dictionary are called, by its name: the labels beside
    it, or Neuronpedia's where they can be had."""
    made = {}
    for each, effects in zip(shelved, found.effects, strict=True):
        card = each.dictionary.card
        made[card.name] = each.texts
        if not each.labels and card.neuronpedia_id is not None:
            shown = [feature.feature for feature in effects.top(k)]
            made[card.name] = published_labels(card, shown)
    return made


@dataclass(frozen=True, slots=True)
class Explainer:
    """Tells the `k` largest features of what each text's plan injects, with their labels."""

    model: HookedModel
    shelved: Sequence[Shelved]
    k: int = 10

    def __call__(self, texts: Sequence[Text]) -> list[list[FeatureEffect]]:
        dictionaries = [each.dictionary for each in self.shelved]
        return [
            found.top(self.k, labels_of(self.shelved, found, self.k))
            for found in attribute(self.model, dictionaries, texts)
        ]

    @property
    def content(self) -> dict[str, str]:
        """How many features, and the digests of every dictionary's tensors and labels."""
        made = {"k": str(self.k)}
        for each in self.shelved:
            labels = hashlib.sha256(repr(sorted(each.texts.items())).encode()).hexdigest()
            digest = weights_digest(_tensors(each.dictionary))
            made[each.dictionary.card.name] = f"{digest}, labels {labels}"
        return made


def read_labels(folder: Path) -> dict[int, Label]:
    """The labels that lie beside a dictionary; none where there is no such file.

    Raises:
        InputFileError: if the file is malformed.
    """
    path = folder / LABELS
    if not path.is_file():
        return {}
    try:
        content = parsed(path.read_text(encoding="utf-8"))
        return {
            feature: _label(row)
            for feature, row in enumerate(_rows(content))
            if row["label"] is not None
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputFileError(path, f"must hold labels of features: {error!r}") from error


def _rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns = content["columns"]
    return [dict(zip(columns, row, strict=True)) for row in content["rows"]]


def _label(row: Mapping[str, Any]) -> Label:
    text, kind, precise = row["label"], row["kind"], row["precise"]
    if not (isinstance(text, str) and isinstance(kind, str) and isinstance(precise, bool)):
        raise ValueError(f"label and kind are text and precise is true or false, not {row}")
    return Label(text, kind, precise)


def _opened(source: Path, model: HookedModel) -> Shelved:
    crosscoder = source.is_file() or (source / CROSSCODER_WEIGHTS).is_file()
    dictionary: Dictionary = load_crosscoder(source) if crosscoder else load_sae(source)
    folder = source.parent if source.is_file() else source
    return Shelved(fit_to_model(dictionary, model), read_labels(folder))
