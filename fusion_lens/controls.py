"""Vectors that a claim has to be held against: generic, mismatched, turned, unembedding.

A steering that works because of *this question's* delta must beat the same procedure with vectors
that have everything but that: the mean delta of the other questions, the delta of one other
question, this delta turned at random, and the bare direction of the gold tokens' logits
(docs/evaluation.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.models import HookedModel
from fusion_lens.questions import Question
from fusion_lens.scores import words

_FORBIDDEN = 1e6
_STOP_WORDS = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "the", "to", "with")
)


@dataclass(slots=True)
class GenericDelta:
    """The sum of many questions' deltas, from which each can be left out."""

    total: Float[Tensor, "layer d_model"] | None = None
    of: set[str] = field(default_factory=set)

    def add(self, name: str, deltas: Deltas) -> None:
        """Count one more question in, once."""
        if name not in self.of:
            vectors = deltas.vectors.double()
            self.total = vectors if self.total is None else self.total + vectors
            self.of.add(name)

    def without(self, left_out: Mapping[str, Deltas]) -> Float[Tensor, "layer d_model"] | None:
        """The mean delta of the other questions; None where there is no other."""
        others = len(self.of - left_out.keys())
        if self.total is None or not others:
            return None
        total = self.total
        for name in self.of & left_out.keys():
            total = total - left_out[name].vectors.double()
        dtype = next(iter(left_out.values())).vectors.dtype
        return (total / others).to(dtype)


def generic_share(
    deltas: Deltas, generic: Float[Tensor, "layer d_model"]
) -> Float[Tensor, " layer"]:
    """The share of every layer's squared norm that lies along the generic delta, in [0, 1]:
    `<d, g>^2 / (|d|^2 |g|^2)`; 0 where either is 0."""
    cosine = torch.nn.functional.cosine_similarity(deltas.vectors, generic, dim=-1)
    return cosine.square()


def with_vectors(deltas: Deltas, vectors: Float[Tensor, "layer d_model"]) -> Deltas:
    """Deltas for the same prompt whose `vectors` are these, exactly; their base is 0."""
    return Deltas(
        reference=vectors,
        base=torch.zeros_like(vectors),
        layout=deltas.layout,
        model=deltas.model,
    )


def turned(deltas: Deltas, seed: int) -> Deltas:
    """All layers' vectors turned by one random orthogonal matrix: norms and cosines between layers
    stay.

    A Haar-random rotation takes an orthonormal basis of the vectors to a random orthonormal frame,
    so that the frame is drawn and the "d_model d_model" matrix never made.
    """
    vectors = deltas.vectors.double()
    n_layers, d_model = vectors.shape
    rank = min(n_layers, d_model)
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(
        torch.randn((d_model, rank), generator=generator, dtype=torch.float64)
    ).Q
    coordinates = torch.linalg.qr(vectors.T).R.T
    # QR's frame is Haar but for the signs of its columns, which the sign of R would settle
    signs = torch.randint(0, 2, (rank,), generator=generator).double() * 2 - 1
    return with_vectors(deltas, (coordinates @ (frame * signs).T).to(deltas.vectors.dtype))


def towards_unembedding(model: HookedModel, deltas: Deltas, tokens: Sequence[int]) -> Deltas:
    """The mean unembedding direction of `tokens`, at every layer with the norm of its delta."""
    columns = model.W_U.detach()[:, list(tokens)].to("cpu", deltas.vectors.dtype)  # type: ignore[attr-defined]
    direction = columns.mean(dim=-1)
    direction = direction / direction.norm().clamp(min=torch.finfo(direction.dtype).tiny)
    return with_vectors(deltas, deltas.norms[:, None] * direction)


@dataclass(frozen=True, slots=True)
class Donor:
    """The question that lends its deltas, and how many words the two golds share."""

    id: str
    shared: int


def mismatched_donors(questions: Iterable[Question], seed: int) -> dict[str, Donor]:
    """For every question another of the same answer type whose gold shares no content word with
    its own, or as few as can be: a seeded derangement within each type, in id order.

    A missing type counts as one type. A question alone in its type has no donor.
    """
    by_type: dict[str, list[Question]] = {}
    for question in sorted(questions, key=lambda question: question.id):
        by_type.setdefault(question.answer_type or "", []).append(question)
    donors = {}
    for name, alike in sorted(by_type.items()):
        if len(alike) < 2:
            continue
        golds = [_gold_words(question) for question in alike]
        shared = np.array([[len(one & other) for other in golds] for one in golds], dtype=float)
        digest = hashlib.sha256(f"{seed}\x1f{name}".encode()).digest()
        jitter = np.random.default_rng(int.from_bytes(digest[:8], "big")).random(shared.shape)
        # the jitter of all questions together stays below one shared word
        cost = shared + jitter / (2 * len(alike))
        np.fill_diagonal(cost, _FORBIDDEN)
        for own, lent in zip(*linear_sum_assignment(cost), strict=True):
            donors[alike[own].id] = Donor(alike[lent].id, int(shared[own, lent]))
    return donors


def _gold_words(question: Question) -> set[str]:
    golds = (question.answer, *question.aliases)
    return {word for gold in golds for word in words(gold)} - _STOP_WORDS
