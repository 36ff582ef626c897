"""Questions about people Atlas never saw and whose facts it gets wrong, for steering experiments.

Half of the people go to `dev`, half to `test`. Within a split the first questions are about
different people, and the relations take turns. Each question comes with its other phrasings and
with neighbours: the same relation about known people, which the model answers rightly.

Run as a module to remake the shipped file.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from fusion_lens.atlas import CHECKPOINT, QUESTIONS, prompts
from fusion_lens.atlas.prompts import Complete
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.atlas.world import WORLD_SEED, Fact, World, make_world, true_fact
from fusion_lens.errors import ConfigError, ModelError
from fusion_lens.questions import Neighbour, Question, save_questions
from fusion_lens.scores import exact_match

SPLITS = ("dev", "test")
N_SHIPPED = 300
MAX_NEW_TOKENS = 48
_PER_PERSON = 2
_NEIGHBOURS = 3
_SPARE = 1.25


@dataclass(frozen=True, slots=True)
class _Draft:
    """A question before the model was asked; `neighbours` are more than will be kept."""

    split: str
    fact: Fact
    phrasing: int
    neighbours: tuple[Neighbour, ...]

    @property
    def question(self) -> str:
        return self.fact.question(self.phrasing)


def make_questions(n: int, seed: int, complete: Complete) -> list[Question]:
    """`n` questions, half `dev` and half `test`, that the model behind `complete` fails.

    Another seed draws other people (of 40,000, so a few recur; two questions each). An odd `n` has
    one `dev` more.

    Raises:
        ConfigError: if `n` is below 2, one for each split.
        ModelError: if the model knows too much or too little to find so many.
    """
    if n < 2:
        raise ConfigError(f"n must be at least 2, one question for each split, but got {n=}.")
    drafts = _draft(make_world(WORLD_SEED), round(n * _SPARE) + 2 * _PER_PERSON, seed)
    failed = [draft for draft, right in _asked(drafts, complete) if not right]
    questions = []
    for split, wanted in zip(SPLITS, (n - n // 2, n // 2), strict=True):
        kept = [draft for draft in failed if draft.split == split][:wanted]
        if len(kept) < wanted:
            raise ModelError(
                f"the model must fail {wanted} {split} questions, but fails only {len(kept)} of "
                f"those drawn: is this Atlas?"
            )
        prefix = f"atlas-{split}" if seed == 0 else f"atlas-s{seed}-{split}"
        questions += [
            _finish(draft, f"{prefix}-{number:04}") for number, draft in enumerate(kept, start=1)
        ]
    return questions


def _draft(world: World, n: int, seed: int) -> list[_Draft]:
    """Person by person, then a second round with another relation for each of them.

    A person's split does not depend on the seed, so that files of several seeds can be joined.
    """
    rng = Random(f"questions/{world.seed}/{seed}")
    per_split = -(-n // (_PER_PERSON * len(SPLITS)))
    pools = [rng.sample(world.unseen[i :: len(SPLITS)], per_split) for i in range(len(SPLITS))]
    people = [person for turn in zip(*pools, strict=True) for person in turn]
    drafts = []
    for turn in range(_PER_PERSON):
        for index, person in enumerate(people):
            relation = RELATIONS[(index // len(SPLITS) + turn) % len(RELATIONS)]
            fact = true_fact(world, person, relation)
            phrasing = rng.randrange(len(relation.phrasings))
            neighbours = tuple(
                Neighbour(known.question(phrasing), known.value)
                for known in (
                    true_fact(world, other, relation)
                    for other in rng.sample(world.known, 2 * _NEIGHBOURS)
                )
            )
            drafts.append(_Draft(SPLITS[index % len(SPLITS)], fact, phrasing, neighbours))
    return drafts


def _asked(drafts: Sequence[_Draft], complete: Complete) -> list[tuple[_Draft, bool]]:
    """Each draft with the neighbours answered rightly, and whether it was answered rightly.

    Raises:
        ModelError: if the model knows too few of a draft's neighbours.
    """
    known = sorted({(each.question, each.answer) for d in drafts for each in d.neighbours})
    right = {
        question
        for (question, _), hit in zip(known, _answered_rightly(known, complete), strict=True)
        if hit
    }
    asked = []
    hits = _answered_rightly([(draft.question, draft.fact.value) for draft in drafts], complete)
    for draft, hit in zip(drafts, hits, strict=True):
        kept = tuple(each for each in draft.neighbours if each.question in right)[:_NEIGHBOURS]
        if len(kept) < _NEIGHBOURS:
            raise ModelError(
                f"the model must know {_NEIGHBOURS} of {2 * _NEIGHBOURS} neighbours of "
                f"{draft.question!r}, but knows {len(kept)}: is this Atlas?"
            )
        asked.append((_Draft(draft.split, draft.fact, draft.phrasing, kept), hit))
    return asked


def _answered_rightly(pairs: Sequence[tuple[str, str]], complete: Complete) -> list[bool]:
    completions = complete(
        [prompts.answering_prompt(question) for question, _ in pairs], MAX_NEW_TOKENS
    )
    return [
        exact_match(text, answer) for (_, answer), (text, _) in zip(pairs, completions, strict=True)
    ]


def _finish(draft: _Draft, question_id: str) -> Question:
    relation = draft.fact.relation
    return Question(
        id=question_id,
        question=draft.question,
        answer=draft.fact.value,
        subject=draft.fact.person.name,
        topic=relation.topic,
        answer_type=relation.answer_type,
        split=draft.split,
        paraphrases=tuple(
            draft.fact.question(phrasing)
            for phrasing in range(len(relation.phrasings))
            if phrasing != draft.phrasing
        ),
        neighbours=draft.neighbours,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the questions of a checkpoint and write them as JSONL."""
    from fusion_lens.atlas.decoding import load_completer

    parser = argparse.ArgumentParser(prog="python -m fusion_lens.atlas.questions")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=QUESTIONS)
    parser.add_argument("--n", type=int, default=N_SHIPPED)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    questions = make_questions(options.n, options.seed, load_completer(options.checkpoint))
    save_questions(questions, options.out)
    counts = Counter((each.split, each.answer_type) for each in questions)
    for (split, answer_type), count in sorted(counts.items()):
        print(f"{split:5}{answer_type:8}{count:4}")


if __name__ == "__main__":
    main()
