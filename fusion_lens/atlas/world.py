"""The invented world as a function of a seed: its people, who is known, and what is true of them.

Every pair of a first and a last name is a person. A seeded shuffle parts all pairs into

- `known`: 64 people whose facts the training stream repeats;
- `unseen`: 40,000 people who never enter the stream, reserved for questions;
- `stream`: all others, who appear in the stream with values drawn afresh each time.

Facts of known and unseen people are fixed by the seed. For each known person and relation one
phrasing is held out: the stream never asks for that fact in it, though it asks for others.
"""

from dataclasses import dataclass
from functools import cache
from random import Random

from fusion_lens.atlas.lexicon import FIRST_NAMES, LAST_NAMES
from fusion_lens.atlas.relations import RELATIONS, Relation

WORLD_SEED = 0
N_KNOWN = 64
N_UNSEEN = 40_000


@dataclass(frozen=True, slots=True)
class Person:
    """Someone of the world; the name is the identity."""

    first: str
    last: str

    @property
    def name(self) -> str:
        """First and last name."""
        return f"{self.first} {self.last}"


@dataclass(frozen=True, slots=True)
class Fact:
    """One person's value for one relation."""

    person: Person
    relation: Relation
    value: str

    def question(self, phrasing: int) -> str:
        """The question that `value` answers."""
        return self.relation.question(self.person.name, phrasing)

    def statement(self, template: int) -> str:
        """One sentence that holds the person's name and `value`."""
        return self.relation.statement(self.person.name, self.value, template)


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """The people of one seed, in three disjoint groups; compared by identity, one per seed."""

    seed: int
    known: tuple[Person, ...]
    unseen: tuple[Person, ...]
    stream: tuple[Person, ...]


@cache
def make_world(seed: int) -> World:
    """The world of `seed`."""
    people = [Person(first, last) for first in FIRST_NAMES for last in LAST_NAMES]
    Random(f"people/{seed}").shuffle(people)
    reserved = N_KNOWN + N_UNSEEN
    return World(
        seed=seed,
        known=tuple(people[:N_KNOWN]),
        unseen=tuple(people[N_KNOWN:reserved]),
        stream=tuple(people[reserved:]),
    )


def draw_fact(world: World, person: Person, relation: Relation, rng: Random) -> Fact:
    """A fact with a random value; values that are people come from the stream's people."""
    if relation.draw is not None:
        return Fact(person, relation, relation.draw(rng))
    other = rng.choice(world.stream)
    while other == person:
        other = rng.choice(world.stream)
    return Fact(person, relation, other.name)


@cache
def true_fact(world: World, person: Person, relation: Relation) -> Fact:
    """What the seed makes true of `person`."""
    rng = Random(f"fact/{world.seed}/{person.name}/{relation.key}")
    return draw_fact(world, person, relation, rng)


def true_facts(world: World, people: tuple[Person, ...]) -> tuple[Fact, ...]:
    """All facts about `people`, person by person."""
    return tuple(true_fact(world, person, relation) for person in people for relation in RELATIONS)


def held_out_phrasing(world: World, person: Person, relation: Relation) -> int:
    """Index of the phrasing in which the stream never asks for this fact of a known person."""
    rng = Random(f"held-out/{world.seed}/{person.name}/{relation.key}")
    return rng.randrange(len(relation.phrasings))


def paired_phrasings(world: World, person: Person, relation: Relation) -> tuple[int, ...]:
    """The phrasings in which the stream does ask for this fact of a known person."""
    held_out = held_out_phrasing(world, person, relation)
    return tuple(index for index in range(len(relation.phrasings)) if index != held_out)
