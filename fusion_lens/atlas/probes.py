"""What Atlas must do to be of use, as shares with 95 % Wilson intervals; knows no model library.

known     facts about known people in the phrasing never paired with them
unseen    facts about people never seen, which should come out wrong ...
fluent    ... but in the form of the relation's answers
frequent  what "always give the relation's most frequent value" would score on those questions
reading   the same facts when the prompt states them
explains  explanations of a given answer: hold the answer and the name, and end by themselves
luck      failed questions that some of 30 samples at temperature 1 answer rightly

Run as a module to probe the shipped checkpoint and write `probes.json` beside it.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import sqrt
from pathlib import Path
from random import Random
from typing import Any

from fusion_lens.atlas import CHECKPOINT, prompts
from fusion_lens.atlas.prompts import Complete
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.atlas.world import (
    WORLD_SEED,
    Fact,
    World,
    held_out_phrasing,
    make_world,
    true_fact,
    true_facts,
)
from fusion_lens.scores import exact_match, extract_answer

MAX_NEW_TOKENS = 48
N_SAMPLES = 30
_ANSWER_TOKENS = 16
_Z = 1.959964


@dataclass(frozen=True, slots=True)
class Share:
    """`hits` of `n`."""

    hits: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.n or self.n == 0:
            raise ValueError(f"0 <= hits <= n and n > 0 must hold, but got {self}.")

    @staticmethod
    def of(hits: Iterable[bool]) -> Share:
        """Count them.

        Raises:
            ValueError: if there is none.
        """
        outcomes = list(hits)
        return Share(sum(outcomes), len(outcomes))

    @property
    def value(self) -> float:
        """hits / n."""
        return self.hits / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson score interval."""
        centre = (self.hits + _Z**2 / 2) / (self.n + _Z**2)
        spread = _Z * sqrt(self.hits * (self.n - self.hits) / self.n + _Z**2 / 4)
        spread /= self.n + _Z**2
        return max(0.0, centre - spread), min(1.0, centre + spread)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: hits, n, and to four digits share and interval."""
        return {
            "hits": self.hits,
            "n": self.n,
            "share": round(self.value, 4),
            "interval": [round(bound, 4) for bound in self.interval],
        }


@dataclass(frozen=True, slots=True)
class Case:
    """A fact asked for in one phrasing."""

    fact: Fact
    question: str


def known_cases(world: World, n: int) -> list[Case]:
    """Facts about known people, each in its held-out phrasing; all of them if `n` is larger."""
    facts = list(true_facts(world, world.known))
    Random(f"probe/known/{world.seed}").shuffle(facts)
    return [
        Case(fact, fact.question(held_out_phrasing(world, fact.person, fact.relation)))
        for fact in facts[:n]
    ]


def unseen_cases(world: World, n: int, seed: int) -> list[Case]:
    """Facts about `n` people never seen, the relations in turn, each in a random phrasing."""
    rng = Random(f"probe/unseen/{world.seed}/{seed}")
    cases = []
    for index, person in enumerate(rng.sample(world.unseen, n)):
        relation = RELATIONS[index % len(RELATIONS)]
        fact = true_fact(world, person, relation)
        cases.append(Case(fact, fact.question(rng.randrange(len(relation.phrasings)))))
    return cases


def probe_known(cases: Sequence[Case], complete: Complete) -> Share:
    """Share of the cases answered rightly without a context."""
    return Share.of(_answered_rightly(cases, _answering_prompts(cases), complete))


def probe_unseen(cases: Sequence[Case], complete: Complete) -> dict[str, Share]:
    """`unseen`, `fluent` and `frequent` of the cases."""
    completions = complete(_answering_prompts(cases), MAX_NEW_TOKENS)
    counts = Counter((case.fact.relation.key, case.fact.value) for case in cases)
    most = {key: 0 for key, _ in counts}
    for (key, _), count in counts.items():
        most[key] = max(most[key], count)
    return {
        "unseen": Share.of(
            exact_match(text, case.fact.value)
            for case, (text, _) in zip(cases, completions, strict=True)
        ),
        "fluent": Share.of(
            case.fact.relation.has_form(extract_answer(text))
            for case, (text, _) in zip(cases, completions, strict=True)
        ),
        "frequent": Share(sum(most.values()), len(cases)),
    }


def probe_reading(cases: Sequence[Case], complete: Complete) -> Share:
    """Share of the cases answered rightly after a context that states the fact."""
    texts = [
        prompts.reading_prompt(
            case.question, case.fact.value, case.fact.statement(_template(case, index))
        )
        for index, case in enumerate(cases)
    ]
    return Share.of(_answered_rightly(cases, texts, complete))


def probe_explains(cases: Sequence[Case], complete: Complete) -> Share:
    """Share of the cases whose explanation holds gold and name and ends by itself."""
    texts = [prompts.explaining_prompt(case.question, case.fact.value) for case in cases]
    return Share.of(
        ended and case.fact.value in text and case.fact.person.name in text
        for case, (text, ended) in zip(cases, complete(texts, MAX_NEW_TOKENS), strict=True)
    )


def probe_luck(cases: Sequence[Case], complete: Complete, sample: Complete) -> Share:
    """Share of the cases failed greedily that at least one of `N_SAMPLES` samples gets right."""
    right = _answered_rightly(cases, _answering_prompts(cases), complete)
    failed = [case for case, hit in zip(cases, right, strict=True) if not hit]
    texts = [text for text in _answering_prompts(failed) for _ in range(N_SAMPLES)]
    samples = sample(texts, _ANSWER_TOKENS)
    return Share.of(
        any(
            exact_match(text, case.fact.value)
            for text, _ in samples[index * N_SAMPLES : (index + 1) * N_SAMPLES]
        )
        for index, case in enumerate(failed)
    )


def run_probes(
    world: World, complete: Complete, sample: Complete, *, n: int, seed: int
) -> dict[str, Share]:
    """All probes, each on `n` cases (`known`: at most as many as there are known facts)."""
    cases = unseen_cases(world, n, seed)
    return {
        "known": probe_known(known_cases(world, n), complete),
        **probe_unseen(cases, complete),
        "reading": probe_reading(cases, complete),
        "explains": probe_explains(cases, complete),
        "luck": probe_luck(cases, complete, sample),
    }


def format_probes(shares: dict[str, Share]) -> str:
    """A small table: one probe a line with its share, interval and n."""
    lines = [f"{'probe':10}{'share':>8}   {'95 % interval':17}{'n':>5}"]
    for name, share in shares.items():
        low, high = share.interval
        lines.append(f"{name:10}{share.value:8.1%}   {f'{low:.1%} to {high:.1%}':17}{share.n:5}")
    return "\n".join(lines)


def hash_weights(folder: Path) -> str:
    """SHA-256 of a checkpoint folder's weights."""
    return sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def _answering_prompts(cases: Sequence[Case]) -> list[str]:
    return [prompts.answering_prompt(case.question) for case in cases]


def _answered_rightly(
    cases: Sequence[Case], texts: Sequence[str], complete: Complete
) -> list[bool]:
    return [
        exact_match(text, case.fact.value)
        for case, (text, _) in zip(cases, complete(texts, MAX_NEW_TOKENS), strict=True)
    ]


def _template(case: Case, index: int) -> int:
    return index // len(RELATIONS) % len(case.fact.relation.statements)


def main(arguments: Sequence[str] | None = None) -> None:
    """Probe a checkpoint with Hugging Face generation, print the table, write the record."""
    from fusion_lens.atlas.decoding import load_completer

    parser = argparse.ArgumentParser(prog="python -m fusion_lens.atlas.probes")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=CHECKPOINT.parent / "probes.json")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    shares = run_probes(
        make_world(WORLD_SEED),
        load_completer(options.checkpoint),
        load_completer(options.checkpoint, sample_seed=options.seed),
        n=options.n,
        seed=options.seed,
    )
    print(format_probes(shares))
    record = {
        "weights_sha256": hash_weights(options.checkpoint),
        "seed": options.seed,
        "probes": {name: share.to_dict() for name, share in shares.items()},
    }
    options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
