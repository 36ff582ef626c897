"""Every question of a file prepared once, and the vectors each lends to the others' control arms.

Donors are all questions of the file and split, before any limit, in id order, each with its own
reference and mean. Their means lie in a temporary file, so that memory does not grow with them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

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
from fusion_lens.preparation import Failure, Prepared, TuningConfig, prepare, seed_of
from fusion_lens.progress import Progress
from fusion_lens.prompts import tokenize
from fusion_lens.questions import Question
from fusion_lens.units import LEAST, Momenta, consistent


@dataclass(slots=True)
class Lenders:
    """Prepared questions by id, those that failed, and what they lend. Use as a context manager:
    the file goes when it ends."""

    model: HookedModel
    config: TuningConfig
    prepared: dict[str, Prepared] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)
    generic: GenericDelta = field(default_factory=GenericDelta)
    centre: bool = False
    _momenta: Momenta | None = None
    _able: list[Question] = field(default_factory=list)
    _donors: dict[str, Donor] | None = None
    _folder: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="fusion_lens-")
    )

    def __enter__(self) -> Lenders:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.prepared.clear()
        self._folder.cleanup()

    def gather(
        self,
        questions: Sequence[Question],
        donors: Sequence[Question],
        *,
        block_size: int,
        log: EngineLog,
        progress: Progress | None = None,
    ) -> None:
        """Prepare the questions and their donors, a block at a time."""
        lending = {question.id for question in donors}
        everyone = {question.id: question for question in (*donors, *questions)}
        ordered = [everyone[name] for name in sorted(everyone)]
        if progress is not None and ordered:
            progress("preparing", 0, len(ordered))
        for start in range(0, len(ordered), block_size):
            block = ordered[start : start + block_size]
            ready, failed = prepare(self.model, block, self.config, log=log)
            self.failures |= {failure.question_id: failure for failure in failed}
            for item, deltas in zip(ready, self._filed(start, ready), strict=True):
                name = item.question.id
                self.prepared[name] = replace(item, deltas=deltas)
                if name in lending:
                    self.generic.add(name, deltas)
                    own = consistent([deltas])
                    self._momenta = own if self._momenta is None else self._momenta + own
            if progress is not None:
                progress("preparing", min(start + block_size, len(ordered)), len(ordered))
        self._able = [q for q in ordered if q.id in lending and q.id in self.prepared]

    @property
    def donors(self) -> dict[str, Donor]:
        """See `controls.mismatched_donors`; found when first asked for."""
        if self._donors is None:
            self._donors = mismatched_donors(self._able, self.config.search.seed)
        return self._donors

    def lend(self, kind: str, to: Prepared) -> Deltas | None:
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
            return turned(own, seed_of(self.config.search.seed, to.question.id, "random"))
        assert kind == "unembed", kind
        gold = tokenize(self.model, f" {to.question.answer}", prepend_bos=False)
        return towards_unembedding(self.model, own, gold.tokens)

    def ranking(self, to: Prepared) -> Int[Tensor, "unit 2"] | None:
        """Units by how much alike the other questions' deltas move them (`units`), their own means
        included where the run is centred; None where there are fewer than two."""
        momenta, name = self._momenta, to.question.id
        if momenta is not None and name in self.generic.of:
            momenta = momenta - consistent([self.prepared[name].deltas])
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

    def _filed(self, name: int, ready: Sequence[Prepared]) -> list[Deltas]:
        """The same deltas, in a file that is mapped into memory."""
        if not ready:
            return []
        means = torch.stack([torch.stack((p.deltas.reference, p.deltas.base)) for p in ready])
        path = Path(self._folder.name) / str(name)
        path.touch()
        kept = torch.from_file(str(path), shared=True, size=means.numel(), dtype=means.dtype)
        kept = kept.view(means.shape).copy_(means)
        return [
            replace(item.deltas, reference=mean[0], base=mean[1])
            for item, mean in zip(ready, kept, strict=True)
        ]


def _named(*items: Prepared) -> dict[str, Deltas]:
    return {item.question.id: item.deltas for item in items}
