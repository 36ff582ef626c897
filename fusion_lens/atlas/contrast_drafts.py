"""What is asked of Atlas for the contrast sets: questions with and without a context, as drafts.

Knows no model: a draft says what the model must answer to become an example.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from fusion_lens.atlas import prompts
from fusion_lens.atlas.contrast_people import People
from fusion_lens.atlas.relations import RELATIONS, Relation
from fusion_lens.atlas.world import Fact, Person, World, draw_fact, true_fact
from fusion_lens.contrasts import holds
from fusion_lens.errors import ConfigError

CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt before the model was asked. `says` is the answer that makes it an example of its
    group (None: any of the relation's form); `target` is the wanted value."""

    group: str
    fact: Fact
    prompt: str
    says: str | None
    target: str | None = None


def draw_dates(world: World, people: People, n: int, rng: Random) -> Iterator[Draft]:
    """Questions for the birth dates of `n` unseen people."""
    for person in rng.sample(people.unseen, n):
        yield asked(world, person, RELATIONS[0], rng, "dates")


def draw_conflicts(world: World, people: People, n: int, rng: Random) -> Iterator[Draft]:
    """Questions about known people behind a context that is false; all facts if `n` is larger."""
    for person, relation in some_facts(people, RELATIONS, n, rng):
        true = true_fact(world, person, relation)
        false = draw_fact(world, person, relation, rng)
        while holds(false.value, true.value) or holds(true.value, false.value):
            false = draw_fact(world, person, relation, rng)
        yield told(false, rng, "conflict", true.value)


def draw_reading(world: World, people: People, n: int, rng: Random) -> Iterator[Draft]:
    """Questions about `n` unseen people behind a context, the relations in turn."""
    for i, person in enumerate(rng.sample(people.unseen, n)):
        relation = RELATIONS[i % len(RELATIONS)]
        yield told(draw_fact(world, person, relation, rng), rng, "reading")


def told(fact: Fact, rng: Random, group: str, target: str | None = None) -> Draft:
    """A question behind a context that states the fact, in a random phrasing and template."""
    template = rng.randrange(len(fact.relation.statements))
    question = fact.question(rng.randrange(len(fact.relation.phrasings)))
    prompt = prompts.reading_prompt(question, fact.value, fact.statement(template))
    return Draft(group, fact, prompt, fact.value, target)


def asked(world: World, person: Person, relation: Relation, rng: Random, group: str) -> Draft:
    """A question without a context, in a random phrasing; of known people the answer counts."""
    fact = true_fact(world, person, relation)
    prompt = prompts.answering_prompt(fact.question(rng.randrange(len(relation.phrasings))))
    return Draft(group, fact, prompt, fact.value if person in world.known else None)


def some_facts(
    people: People, relations: Sequence[Relation], n: int, rng: Random
) -> list[tuple[Person, Relation]]:
    """`n` different facts of known people; all of them if `n` is larger."""
    pairs = [(person, relation) for person in people.known for relation in relations]
    return rng.sample(pairs, min(n, len(pairs)))


def matched(
    drafts: Sequence[Draft], candidates: Sequence[Draft], count_tokens: CountTokens
) -> list[Draft]:
    """For each draft in turn the candidate left over that is about the same relation and whose
    prompt is nearest in length.

    A name that Atlas read often has fewer tokens than another: without this a prompt's length would
    tell known people from unseen ones.

    Raises:
        ConfigError: if the candidates of a relation do not suffice.
    """
    left = {
        relation: [draft for draft in candidates if draft.fact.relation == relation]
        for relation in RELATIONS
    }
    chosen = []
    for draft in drafts:
        pool = left[draft.fact.relation]
        if not pool:
            raise ConfigError(
                f"there must be a candidate for every draft, but all {len(candidates)} are taken "
                f"or of another relation than {draft.fact.relation.key!r}; draw more."
            )
        wanted = count_tokens(draft.prompt)
        gaps = [abs(count_tokens(each.prompt) - wanted) for each in pool]
        chosen.append(pool.pop(gaps.index(min(gaps))))
    return chosen
