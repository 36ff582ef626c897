"""Firings of features and concepts of tokens -> the concept that fits each feature best.

    F_0.5 = 1.25 * precision * recall / (0.25 * precision + recall)
    precision = P(concept | fires),   recall = P(fires | concept)

A concept is a kind and a name (see `token_truth`). Knows nothing of dictionaries or models.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from fusion_lens.atlas.token_truth import KINDS

MIN_TOKENS = 20

Concept = tuple[str, str]
"""(kind, name)."""


def find_concepts(
    per_token: Sequence[Mapping[str, str]], *, at_least: int = MIN_TOKENS
) -> list[Concept]:
    """Concepts that hold of enough tokens, in the order of `KINDS`, then by name."""
    counts = Counter(concept for token in per_token for concept in token.items())
    kept = (concept for concept, count in counts.items() if count >= at_least)
    return sorted(kept, key=lambda concept: (KINDS.index(concept[0]), concept[1]))


def concept_table(
    per_token: Sequence[Mapping[str, str]], concepts: Sequence[Concept]
) -> Int[Tensor, "token kind"]:
    """The place in `concepts` of each token's concept of each kind, or -1."""
    places = {concept: place for place, concept in enumerate(concepts)}
    rows = [
        [places.get((kind, token[kind]), -1) if kind in token else -1 for kind in KINDS]
        for token in per_token
    ]
    return torch.tensor(rows).view(-1, len(KINDS))


def count_firings(
    fires: Iterable[tuple[Int[Tensor, " firing"], Int[Tensor, " firing"]]],
    table: Int[Tensor, "token kind"],
    *,
    d_sae: int,
    n_concepts: int,
) -> tuple[Int[Tensor, "d_sae concept"], Int[Tensor, " d_sae"], Int[Tensor, " concept"]]:
    """Firings of each feature on each concept, firings of each feature, tokens of each concept.

    `fires` gives (token, feature) pairs.
    """
    hits = torch.zeros(d_sae * n_concepts, dtype=torch.long)
    fired = torch.zeros(d_sae, dtype=torch.long)
    for token, feature in fires:
        held = table[token]
        flat = (feature[:, None] * n_concepts + held)[held >= 0]
        hits += torch.bincount(flat, minlength=d_sae * n_concepts)
        fired += torch.bincount(feature, minlength=d_sae)
    sizes = torch.bincount(table[table >= 0], minlength=n_concepts)
    return hits.view(d_sae, n_concepts), fired, sizes


def best_concepts(
    hits: Int[Tensor, "d_sae concept"],
    fired: Int[Tensor, " d_sae"],
    sizes: Int[Tensor, " concept"],
) -> Int[Tensor, " d_sae"]:
    """The place of each feature's concept with the highest F_0.5; the earlier of equal ones."""
    precision = hits / fired.clamp(min=1)[:, None]
    recall = hits / sizes.clamp(min=1)
    score = 1.25 * precision * recall / (0.25 * precision + recall).clamp(min=1e-12)
    order = torch.linspace(0, 1e-6, hits.shape[1])
    return (score - order).argmax(dim=1)
