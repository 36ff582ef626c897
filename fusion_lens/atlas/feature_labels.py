"""Labels for the features of the shipped dictionaries, scored against the world's own truth.

    python -m fusion_lens.atlas.feature_labels

A feature fires on a token where its code is above half of the largest it reaches on text of the
training side. Its label is the concept (see `token_truth`) with the highest F_0.5 on that text,

    F_0.5 = 1.25 * precision * recall / (0.25 * precision + recall)
    precision = P(concept | fires),   recall = P(fires | concept)

which weighs precision more than recall, so that a feature gets neither a concept that holds almost
everywhere nor one that explains a few of its firings. Concepts on fewer than 20 tokens are left
out; of equal ones the world's come first. Then precision and recall are taken again on text of
held-out people, with the same concept and the same threshold. A label is *precise* if it is right
on at least 0.9 of at least 10 held-out firings.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.atlas import CHECKPOINT, DICTIONARIES
from fusion_lens.atlas.concepts import (
    Concept,
    best_concepts,
    concept_table,
    count_firings,
    find_concepts,
)
from fusion_lens.atlas.corpus import Document
from fusion_lens.atlas.decoding import load_completer
from fusion_lens.atlas.dictionary_activations import (
    CHUNK,
    record_tokens,
    token_chunks,
    tokenize_documents,
)
from fusion_lens.atlas.dictionary_cards import load_card, open_dictionary, save_card
from fusion_lens.atlas.dictionary_quality import held_out_documents, shipped_dictionaries
from fusion_lens.atlas.dictionary_text import draw_side_documents, make_side
from fusion_lens.atlas.token_truth import KINDS, WORLD_KINDS, token_concepts
from fusion_lens.atlas.world import WORLD_SEED, make_world
from fusion_lens.dictionaries import Dictionary
from fusion_lens.models import HookedModel, load_model

LABELS = "labels.json"
COLUMNS = ("label", "kind", "precise", "precision", "recall", "n_firings", "top")
SHARE = 0.5
MIN_FIRINGS = 10
PRECISE = 0.9
_TRAINING_SEED = 2
_TOP = 20


@dataclass(frozen=True, slots=True, eq=False)
class LabelledText:
    """Residuals of tokens and what is true of them; -1: no concept of that kind."""

    resid: Float[Tensor, "layer token d_model"]
    concepts: Int[Tensor, "token kind"]
    strings: list[str]


@dataclass(frozen=True, slots=True)
class FeatureLabel:
    """A feature's label; precision, recall and firings on held-out text. `top` are the commonest of
    the tokens it fires on most, in training text. A feature that never fires there has no label."""

    feature: int
    label: str | None
    kind: str | None
    precise: bool
    precision: float
    recall: float
    n_firings: int
    top: tuple[str, ...]


def is_precise(precision: float, n_firings: int) -> bool:
    """Whether a label that is right on this share of its held-out firings can be relied on."""
    return n_firings >= MIN_FIRINGS and precision >= PRECISE


def label_features(
    dictionary: Dictionary,
    training: LabelledText,
    held_out: LabelledText,
    concepts: Sequence[Concept],
) -> list[FeatureLabel]:
    """Labels found on one text and scored on the other."""
    highest = torch.stack([codes.amax(dim=0) for codes in _codes(dictionary, training)]).amax(dim=0)
    threshold = (SHARE * highest).clamp(min=1e-12)
    sizes = {"d_sae": dictionary.card.d_sae, "n_concepts": len(concepts)}
    chosen = best_concepts(
        *count_firings(_fires(dictionary, training, threshold), training.concepts, **sizes)
    )
    hits, fired, held = count_firings(
        _fires(dictionary, held_out, threshold), held_out.concepts, **sizes
    )
    top = _top_tokens(dictionary, training)
    labels = []
    for feature, place in enumerate(chosen.tolist()):
        alive = bool(highest[feature] > 0)
        kind, name = concepts[place] if alive else (None, None)
        right, n = int(hits[feature, place]), int(fired[feature])
        precision = right / max(1, n)
        labels.append(
            FeatureLabel(
                feature=feature,
                label=name,
                kind=kind,
                precise=is_precise(precision, n),
                precision=precision,
                recall=right / max(1, int(held[place])),
                n_firings=n,
                top=top[feature] if alive else (),
            )
        )
    return labels


def summarise(labels: Sequence[FeatureLabel]) -> dict[str, Any]:
    """How many features are alive, can be scored, have a precise label, and of which kinds."""
    precise = [label for label in labels if label.precise]
    kinds = Counter(label.kind for label in precise)
    return {
        "features": len(labels),
        "live": sum(label.label is not None for label in labels),
        "scored": sum(label.n_firings >= MIN_FIRINGS for label in labels),
        "precise": len(precise),
        "precise_of_the_world": sum(label.kind in WORLD_KINDS for label in precise),
        "precise_with_recall_half": sum(label.recall >= 0.5 for label in precise),
        "by_kind": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
    }


def save_labels(labels: Sequence[FeatureLabel], folder: Path) -> None:
    """Write labels.json: one row for each feature, in order."""
    rows = [
        [
            *(each.label, each.kind, each.precise, round(each.precision, 3)),
            *(round(each.recall, 3), each.n_firings, list(each.top)),
        ]
        for each in labels
    ]
    head = json.dumps({"share": SHARE, "summary": summarise(labels), "columns": COLUMNS})
    body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    text = f'{head[:-1]}, "rows": [\n{body}\n]}}\n'
    (folder / LABELS).write_text(text, encoding="utf-8")


def _labelled(
    model: HookedModel, documents: Sequence[Document], concepts: Sequence[Concept] | None
) -> tuple[LabelledText, list[Concept]]:
    """A text with its concepts; found in it if none are given."""
    activations = record_tokens(model, tokenize_documents(model, documents))
    per_token = [
        token for document in documents for token in token_concepts(model.tokenizer, document.text)
    ]
    found = find_concepts(per_token) if concepts is None else list(concepts)
    strings = [
        f"{token.get('previous', 'after').removeprefix('after')} {token['token']}".strip()
        for token in per_token
    ]
    return LabelledText(activations.resid, concept_table(per_token, found), strings), found


def _codes(dictionary: Dictionary, text: LabelledText) -> Iterator[Float[Tensor, "batch d_sae"]]:
    for x in token_chunks(text.resid, dictionary.card.layers):
        yield dictionary.encode(x).codes


def _fires(
    dictionary: Dictionary, text: LabelledText, threshold: Float[Tensor, " d_sae"]
) -> Iterator[tuple[Int[Tensor, " firing"], Int[Tensor, " firing"]]]:
    for number, codes in enumerate(_codes(dictionary, text)):
        token, feature = (codes >= threshold).nonzero(as_tuple=True)
        yield token + number * CHUNK, feature


def _top_tokens(dictionary: Dictionary, text: LabelledText) -> list[tuple[str, ...]]:
    """By feature the three commonest of the tokens, each behind the one before, with its 20 largest
    codes."""
    values = torch.zeros(0, dictionary.card.d_sae)
    places = torch.zeros(0, dictionary.card.d_sae, dtype=torch.long)
    for number, codes in enumerate(_codes(dictionary, text)):
        best = codes.topk(min(_TOP, len(codes)), dim=0)
        values = torch.cat([values, best.values])
        places = torch.cat([places, best.indices + number * CHUNK])
        kept = values.topk(min(_TOP, len(values)), dim=0)
        values, places = kept.values, places.gather(0, kept.indices)
    return [
        tuple(
            string
            for string, _ in Counter(
                text.strings[place]
                for place, value in zip(column, levels, strict=True)
                if value > 0
            ).most_common(3)
        )
        for column, levels in zip(places.T.tolist(), values.T.tolist(), strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Label the features of all dictionaries; write labels.json and the summary on the cards."""
    parser = argparse.ArgumentParser(prog="python -m fusion_lens.atlas.feature_labels")
    parser.add_argument("--dictionaries", type=Path, default=DICTIONARIES)
    parser.add_argument("--n", type=int, default=4000, help="training documents")
    parser.add_argument("--n-held-out", type=int, default=2000)
    options = parser.parse_args(arguments)
    model = load_model()
    side = make_side(make_world(WORLD_SEED), "train")
    training, concepts = _labelled(
        model,
        draw_side_documents(
            side, options.n, seed=_TRAINING_SEED, complete=load_completer(CHECKPOINT)
        ),
        None,
    )
    held_out, _ = _labelled(model, held_out_documents(options.n_held_out), concepts)
    for folder in shipped_dictionaries(options.dictionaries):
        card = load_card(folder)
        labels = label_features(open_dictionary(folder, model), training, held_out, concepts)
        save_labels(labels, folder)
        summary = {
            "training_tokens": len(training.strings),
            "held_out_tokens": len(held_out.strings),
            "concepts": len(concepts),
            **summarise(labels),
        }
        save_card(folder, {**card, "labels": summary})
        print(folder.name, json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
