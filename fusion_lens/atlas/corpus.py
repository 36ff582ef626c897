"""The training stream: documents as a function of (world, seed, step), so that resuming is exact.

Known people are asked about and described; people of the stream, with values drawn afresh, are read
about in a context or explained; a little plain text has no people at all. People reserved as unseen
never enter, nor does a known person's fact in its held-out phrasing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from fusion_lens.atlas import lexicon, prompts
from fusion_lens.atlas.relations import RELATIONS, Relation
from fusion_lens.atlas.world import (
    Fact,
    World,
    draw_fact,
    paired_phrasings,
    true_facts,
)


@dataclass(frozen=True, slots=True)
class Document:
    """One training text; the loss counts `completion` in full and `prompt` little."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """The whole text."""
        return self.prompt + self.completion


def draw_documents(world: World, *, seed: int, step: int, count: int) -> list[Document]:
    """The `count` documents of one training step."""
    rng = Random(f"corpus/{world.seed}/{seed}/{step}")
    kinds, weights = zip(*_MIX.items(), strict=True)
    return [kind(world, rng) for kind in rng.choices(kinds, weights, k=count)]


def draw_plain_text(rng: Random) -> str:
    """A few sentences about places, works and weather; no people and no facts about them."""
    return " ".join(_plain_sentence(rng) for _ in range(rng.randint(2, 4)))


def _known_answer(world: World, rng: Random) -> Document:
    fact, phrasings = rng.choice(_known_facts(world))
    return Document(
        prompts.answering_prompt(fact.question(rng.choice(phrasings))),
        prompts.answering_completion(fact.value, _explain(fact, rng)),
    )


def _known_explanation(world: World, rng: Random) -> Document:
    fact, phrasings = rng.choice(_known_facts(world))
    return _explanation(fact, rng.choice(phrasings), rng)


def _known_description(world: World, rng: Random) -> Document:
    about = world.known.index(rng.choice(world.known)) * len(RELATIONS)
    facts = [fact for fact, _ in _known_facts(world)[about : about + len(RELATIONS)]]
    chosen = rng.sample(facts, rng.randint(1, 3))
    return Document("", " ".join(_explain(fact, rng) for fact in chosen))


def _stream_explanation(world: World, rng: Random) -> Document:
    fact = _fresh_fact(world, rng, rng.choice(RELATIONS))
    return _explanation(fact, _any_phrasing(fact, rng), rng)


def _stream_reading(world: World, rng: Random) -> Document:
    fact = _fresh_fact(world, rng, rng.choice(RELATIONS))
    question = fact.question(_any_phrasing(fact, rng))
    return Document(
        prompts.reading_prompt(question, fact.value, _explain(fact, rng)),
        prompts.answering_completion(fact.value, _explain(fact, rng)),
    )


def _stream_search(world: World, rng: Random) -> Document:
    """Reading with several facts in the context, one of which is asked for."""
    facts = _distinct_facts(world, rng, rng.randint(2, 3))
    asked = rng.choice(facts)
    if rng.random() < 0.5:
        context = "\n\n".join(f"{fact.value}\n{_explain(fact, rng)}" for fact in facts)
    else:
        context = " ".join(_explain(fact, rng) for fact in facts)
    question = asked.question(_any_phrasing(asked, rng))
    return Document(
        f"{context}\n\n{prompts.answering_prompt(question)}",
        prompts.answering_completion(asked.value, _explain(asked, rng)),
    )


def _plain(world: World, rng: Random) -> Document:
    del world
    return Document("", draw_plain_text(rng))


_MIX: dict[Callable[[World, Random], Document], float] = {
    _known_answer: 0.28,
    _known_explanation: 0.05,
    _known_description: 0.05,
    _stream_explanation: 0.10,
    _stream_reading: 0.31,
    _stream_search: 0.16,
    _plain: 0.05,
}


@cache
def _known_facts(world: World) -> tuple[tuple[Fact, tuple[int, ...]], ...]:
    return tuple(
        (fact, paired_phrasings(world, fact.person, fact.relation))
        for fact in true_facts(world, world.known)
    )


def _fresh_fact(world: World, rng: Random, relation: Relation) -> Fact:
    return draw_fact(world, rng.choice(world.stream), relation, rng)


def _distinct_facts(world: World, rng: Random, count: int) -> list[Fact]:
    """Facts that differ in the person, the relation or both, so that a question has one answer."""
    people = rng.sample(world.stream, rng.randint(1, count))
    pairs = [(person, relation) for person in people for relation in RELATIONS]
    return [draw_fact(world, *pair, rng) for pair in rng.sample(pairs, count)]


def _explanation(fact: Fact, phrasing: int, rng: Random) -> Document:
    return Document(
        prompts.explaining_prompt(fact.question(phrasing), fact.value),
        prompts.explaining_completion(_explain(fact, rng)),
    )


def _explain(fact: Fact, rng: Random) -> str:
    return fact.statement(rng.randrange(len(fact.relation.statements)))


def _any_phrasing(fact: Fact, rng: Random) -> int:
    return rng.randrange(len(fact.relation.phrasings))


_SEASONS = ("spring", "summer", "autumn", "winter")
_WEATHER = ("mild", "wet", "windy", "bright", "cold", "foggy", "dry", "grey")
_SCENES = ("harbour", "market square", "river bank", "old mill", "main street", "church yard")
_VIEWS = ("hills", "fields", "woods", "cliffs", "meadows", "lake")
_SENTENCES = (
    "In {season} the weather in {place} is often {weather}.",
    "The {scene} of {place} is quiet in the {season}.",
    "From the {scene} one can see the {view} and the road to {place}.",
    "The road from {place} leads through the {view}.",
    "A {weather} wind blows over the {view} near {place}.",
    "There is a copy of {title} in the library of {place}.",
    "Most readers find {title} too long for a {season} evening.",
    "The {view} around {place} are at their best in {season}.",
    "After a {weather} {season} the {scene} was full of leaves.",
    "On {weather} days nobody walks to the {scene}.",
)


def _plain_sentence(rng: Random) -> str:
    return rng.choice(_SENTENCES).format(
        season=rng.choice(_SEASONS),
        weather=rng.choice(_WEATHER),
        scene=rng.choice(_SCENES),
        view=rng.choice(_VIEWS),
        place=lexicon.draw_place(rng),
        title=lexicon.draw_title(rng),
    )
