"""Every question of a file prepared once, and the vectors each lends to the others' control arms.

Donors are all questions of the file and split, before any limit, in id order, each with its own
reference and mean. Their means lie in a temporary file, so that memory does not grow with them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.controls import (
    Donor,
    GenericDelta,
    generic_share,
    mismatched_donors,
    towards_unembedding,
    turned,
    with_vectors,
)
from fusion_lens.deltas import Deltas
from fusion_lens.engine_log import EngineLog
from fusion_lens.models import HookedModel
from fusion_lens.preparation import Failure, Prepared, seed_of
from fusion_lens.prompts import tokenize
from fusion_lens.units import LEAST, Momenta, consistent


class Ready(NamedTuple):
    """What was prepared of a block of questions, what failed, and what the engine did for it."""

    prepared: Sequence[Prepared]
    failed: Sequence[Failure]
    log: EngineLog


@dataclass(slots=True)
class Lenders:
    """Prepared questions by id, those that failed, and what they lend.

    `seed` is that of the search; `centre` takes the generic delta from every delta.
    """

    seed: int
    centre: bool = False
    prepared: dict[str, Prepared] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    generic: GenericDelta = field(default_factory=GenericDelta)
    momenta: Momenta | None = None
    donors: dict[str, Donor] = field(default_factory=dict)

    def add(self, ready: Ready, lending: Collection[str]) -> None:
        """Take in a block; those of `lending` lend. Sums depend on the order of blocks."""
        self.failures |= {failure.question_id: failure for failure in ready.failed}
        for item in ready.prepared:
            name = item.question.id
            self.prepared[name] = item
            if name in lending:
                self.generic.add(name, item.deltas)
                own = consistent([item.deltas])
                self.momenta = own if self.momenta is None else self.momenta + own

    def find_donors(self) -> None:
        """Settle who is whose donor among those that lend: see `controls.mismatched_donors`."""
        able = [self.prepared[name].question for name in sorted(self.generic.of)]
        self.donors = mismatched_donors(able, self.seed)

    def only(self, names: Iterable[str]) -> Lenders:
        """The same for some questions alone, with what is lent to them and no more, in tensors of
        their own: those of a file would go with all of it to another process."""
        own = [name for name in names if name in self.prepared]
        donors = {name: self.donors[name] for name in own if name in self.donors}
        kept = {*own, *(donor.id for donor in donors.values())}
        return replace(
            self,
            prepared={name: _apart(self.prepared[name]) for name in kept},
            failures={},
            donors=donors,
        )

    def lend(self, kind: str, to: Prepared, model: HookedModel) -> Deltas | None:
        """The vectors of one kind for a question; None where nobody can lend them.

        "own" is the question's delta, without the generic one if the run is centred; the other
        kinds are those of `controls`. "mismatched" is centred on those that are neither of the two.
        """
        if kind == "own":
            return self._own(to)
        if kind == "generic":
            generic = self.generic.without(_named(to))
            return None if generic is None else with_vectors(to.deltas, generic)
        if kind == "mismatched":
            donor = self.donors.get(to.question.id)
            lent = None if donor is None else self._own(self.prepared[donor.id], to)
            return None if lent is None else with_vectors(to.deltas, lent.vectors)
        own = self._own(to)
        if own is None:
            return None
        if kind == "random":
            return turned(own, seed_of(self.seed, to.question.id, "random"))
        assert kind == "unembed", kind
        gold = tokenize(model, f" {to.question.answer}", prepend_bos=False)
        return towards_unembedding(model, own, gold.tokens)

    def ranking(self, to: Prepared) -> Int[Tensor, "unit 2"] | None:
        """Units by how much alike the other questions' deltas move them (`units`), their own means
        included where the run is centred; None where there are fewer than two."""
        momenta, name = self.momenta, to.question.id
        if momenta is not None and name in self.generic.of:
            momenta = momenta - consistent([to.deltas])
        return None if momenta is None or momenta.n < LEAST else momenta.ranking

    def share(self, of: Prepared) -> Float[Tensor, " layer"] | None:
        """See `controls.generic_share`; None where there is no other question."""
        generic = self.generic.without(_named(of))
        return None if generic is None else generic_share(of.deltas, generic)

    def _own(self, item: Prepared, *besides: Prepared) -> Deltas | None:
        if not self.centre:
            return item.deltas
        generic = self.generic.without(_named(item, *besides))
        if generic is None:
            return None
        return with_vectors(item.deltas, item.deltas.vectors - generic)


@contextmanager
def gathered(
    blocks: Iterable[Ready], lending: Collection[str], *, seed: int, centre: bool = False
) -> Iterator[Lenders]:
    """Lenders of blocks of prepared questions, with their means in a file that is mapped into
    memory; it goes with the context. Questions must come in id order: sums do not depend on how
    they are cut into blocks."""
    lenders = Lenders(seed, centre)
    with tempfile.TemporaryDirectory(prefix="fusion_lens-") as folder:
        for n, ready in enumerate(blocks):
            filed = _filed(Path(folder) / str(n), ready.prepared)
            lenders.add(ready._replace(prepared=filed), lending)
        lenders.find_donors()
        try:
            yield lenders
        finally:
            lenders.prepared.clear()


def _filed(path: Path, prepared: Sequence[Prepared]) -> list[Prepared]:
    if not prepared:
        return []
    means = torch.stack([torch.stack((p.deltas.reference, p.deltas.base)) for p in prepared])
    path.touch()
    kept = torch.from_file(str(path), shared=True, size=means.numel(), dtype=means.dtype)
    kept = kept.view(means.shape).copy_(means)
    return [
        replace(item, deltas=replace(item.deltas, reference=mean[0], base=mean[1]))
        for item, mean in zip(prepared, kept, strict=True)
    ]


def _apart(item: Prepared) -> Prepared:
    means = item.deltas.reference.clone(), item.deltas.base.clone()
    return replace(item, deltas=replace(item.deltas, reference=means[0], base=means[1]))


def _named(*items: Prepared) -> dict[str, Deltas]:
    return {item.question.id: item.deltas for item in items}
