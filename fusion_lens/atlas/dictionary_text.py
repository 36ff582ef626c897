"""The world's people in two sides, and each side's documents, to train and to judge dictionaries.

A dictionary is trained on text about one side's people and judged on text about the other's, who
are neither the subject nor the value of a fact of its training. (What Atlas itself completes may
name anybody as a teacher; docs/atlas_dictionaries.md has the counts.)

- `known`: the first 48 of 64 train, the last 16 are held out. Atlas learned the facts of all 64.
- `unseen`: even places train, odd places are held out, the same parting that the shipped questions
  have: subjects of `dev` train, subjects of `test` are held out. Atlas saw none of them.
- `stream`: even places train, odd places are held out; a known person's teacher goes where the
  known person goes. Atlas may have read any of these names, always with facts drawn afresh.

Names, places, titles, dates and numbers are composed of parts, and the parts occur on both sides.

Of the documents every second one is the corpus' own, drawn where Atlas' training never was, and
dropped if a person of the other side occurs. The others are what steering reads about unseen
people: question with true answer and explanation, with the answer given, with a context that states
it, and with whatever Atlas itself completes.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count, islice
from random import Random

from fusion_lens.atlas import prompts
from fusion_lens.atlas.corpus import Document, draw_documents
from fusion_lens.atlas.lexicon import FIRST_NAMES
from fusion_lens.atlas.prompts import Complete
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.atlas.world import Fact, Person, World, true_fact
from fusion_lens.errors import one_of

SIDES = ("train", "held_out")
N_KNOWN_IN_TRAINING = 48
MAX_NEW_TOKENS = 48
_CORPUS_SEEDS = {"train": 30_000, "held_out": 40_000}
_ROUND = 256
_NAME = re.compile(rf"\b(?:{'|'.join(FIRST_NAMES)}) [A-Z][a-z]+\b")


@dataclass(frozen=True, slots=True, eq=False)
class Side:
    """One of the two sides: its people by group; `world` is the whole world."""

    name: str
    world: World
    known: tuple[Person, ...]
    unseen: tuple[Person, ...]
    stream: tuple[Person, ...]

    def __post_init__(self) -> None:
        one_of("side", self.name, SIDES)

    def holds(self, text: str) -> bool:
        """Whether every person whose full name is in `text` is of this side."""
        return _names_in(text) <= _names(self)


@cache
def make_side(world: World, name: str) -> Side:
    """The side `name` of `world`, "train" or "held_out"."""
    place = SIDES.index(one_of("side", name, SIDES))
    known = (world.known[:N_KNOWN_IN_TRAINING], world.known[N_KNOWN_IN_TRAINING:])
    mine, others = (_teachers(world, people) for people in (known[place], known[1 - place]))
    fixed = mine | others
    stream = [person for person in world.stream[place::2] if person.name not in fixed]
    stream += [person for person in world.stream if person.name in mine]
    return Side(name, world, known[place], world.unseen[place::2], tuple(stream))


def draw_side_documents(
    side: Side, n: int, *, seed: int, complete: Complete | None = None
) -> list[Document]:
    """`n` documents of a side, a function of (world, side, seed) and of what `complete` gives.

    Without `complete` Atlas' own completions are left out, and the other kinds take their share.
    """
    corpus = _corpus_documents(side, seed)
    steering = _steering_documents(side, Random(f"steering/{side.name}/{seed}"), complete)
    own = list(islice(steering, n // 2))
    kept = list(islice(corpus, n - len(own)))
    documents = own + kept
    Random(f"order/{side.name}/{seed}").shuffle(documents)
    return documents


def _corpus_documents(side: Side, seed: int) -> Iterator[Document]:
    for step in count():
        drawn = draw_documents(
            side.world, seed=_CORPUS_SEEDS[side.name] + seed, step=step, count=_ROUND
        )
        yield from (document for document in drawn if side.holds(document.text))


def _steering_documents(side: Side, rng: Random, complete: Complete | None) -> Iterator[Document]:
    kinds: list[Callable[[Fact, Random], Document]] = [_reference, _explaining, _reading]
    while True:
        facts = [_unseen_fact(side, rng) for _ in range(_ROUND)]
        if complete is None:
            yield from (kinds[i % len(kinds)](fact, rng) for i, fact in enumerate(facts))
            continue
        asked = [
            prompts.answering_prompt(_question(fact, rng)) for fact in facts[:: len(kinds) + 1]
        ]
        completed = iter(zip(asked, complete(asked, MAX_NEW_TOKENS), strict=True))
        for i, fact in enumerate(facts):
            if i % (len(kinds) + 1) == 0:
                prompt, (completion, _) = next(completed)
                yield Document(prompt, completion)
            else:
                yield kinds[i % (len(kinds) + 1) - 1](fact, rng)


def _reference(fact: Fact, rng: Random) -> Document:
    return Document(
        prompts.answering_prompt(_question(fact, rng)),
        prompts.answering_completion(fact.value, _statement(fact, rng)),
    )


def _explaining(fact: Fact, rng: Random) -> Document:
    return Document(
        prompts.explaining_prompt(_question(fact, rng), fact.value),
        prompts.explaining_completion(_statement(fact, rng)),
    )


def _reading(fact: Fact, rng: Random) -> Document:
    return Document(
        prompts.reading_prompt(_question(fact, rng), fact.value, _statement(fact, rng)),
        prompts.answering_completion(fact.value, _statement(fact, rng)),
    )


def _unseen_fact(side: Side, rng: Random) -> Fact:
    """A true fact of an unseen person, all of whose people are of this side."""
    relation = rng.choice(RELATIONS)
    while True:
        fact = true_fact(side.world, rng.choice(side.unseen), relation)
        if side.holds(fact.value):
            return fact


def _question(fact: Fact, rng: Random) -> str:
    return fact.question(rng.randrange(len(fact.relation.phrasings)))


def _statement(fact: Fact, rng: Random) -> str:
    return fact.statement(rng.randrange(len(fact.relation.statements)))


def _teachers(world: World, people: tuple[Person, ...]) -> frozenset[str]:
    relation = next(each for each in RELATIONS if each.key == "teacher")
    return frozenset(true_fact(world, person, relation).value for person in people)


def _names_in(text: str) -> set[str]:
    return set(_NAME.findall(text))


@cache
def _names(side: Side) -> frozenset[str]:
    return frozenset(person.name for person in (*side.known, *side.unseen, *side.stream))
