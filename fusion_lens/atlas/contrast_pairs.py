"""Known facts -> pairs of a prompt with the right and with a wrong answer, for methods that compare
the two at the last token.

The wrong answer is what is true of somebody else of the same part, in the same relation. In each
round of a relation every value is right once and wrong once, so that no word of an answer tells
which it is; people whose values have equally many tokens trade, wherever there are two.
"""

from collections.abc import Sequence
from random import Random

from fusion_lens.atlas import prompts
from fusion_lens.atlas.contrast_drafts import CountTokens
from fusion_lens.atlas.contrast_people import People
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.atlas.world import WORLD_SEED, Fact, make_world, true_fact
from fusion_lens.contrasts import Pair

N_PHRASINGS = {"fit": 3, "choose": 1, "report": 2}


def make_pairs(people: People, count_tokens: CountTokens) -> list[Pair]:
    """One pair for each known person of a part, relation and phrasing of `N_PHRASINGS`."""
    world = make_world(WORLD_SEED)
    pairs: list[Pair] = []
    for relation in RELATIONS:
        facts = [true_fact(world, person, relation) for person in people.known]
        rng = Random(f"contrasts/pairs/{world.seed}/{people.part}/{relation.key}")
        phrased = [
            rng.sample(range(len(relation.phrasings)), N_PHRASINGS[people.part]) for _ in facts
        ]
        for turn in range(N_PHRASINGS[people.part]):
            for fact, phrasings, wrong in zip(
                facts, phrased, traded(facts, count_tokens, rng), strict=True
            ):
                pairs.append(
                    Pair(
                        id=f"facts-{people.part}-{len(pairs) + 1:03}",
                        prompt=prompts.answering_prompt(fact.question(phrasings[turn])),
                        right=f"\n{fact.value}",
                        wrong=f"\n{wrong}",
                        subject=fact.person.name,
                        part=people.part,
                        group=relation.key,
                    )
                )
    return pairs


def traded(facts: Sequence[Fact], count_tokens: CountTokens, rng: Random) -> list[str]:
    """For each fact the value of another: all values, each once, none at its own place."""
    groups: dict[int, list[int]] = {}
    for place in rng.sample(range(len(facts)), len(facts)):
        groups.setdefault(count_tokens(f"\n{facts[place].value}"), []).append(place)
    rings = [ring for ring in groups.values() if len(ring) > 1]
    alone = [ring[0] for length, ring in sorted(groups.items()) if len(ring) == 1]
    if len(alone) == 1:
        rings[0].append(alone[0])
    elif alone:
        rings.append(alone)
    values = [""] * len(facts)
    for ring in rings:
        for place, giver in zip(ring, (*ring[1:], ring[0]), strict=True):
            values[place] = facts[giver].value
    return values
