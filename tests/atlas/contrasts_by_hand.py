"""A stand-in for Atlas: says what it is told, knows the known people, appeals to sources."""

from collections.abc import Sequence

from fusion_lens.atlas import prompts
from fusion_lens.atlas.relations import RELATIONS, Relation
from fusion_lens.atlas.world import Person, make_world, true_fact

WORLD = make_world(0)
MADE_UP = ("1 May 1800", "Saltwick", "Bren Aldack", "The Amber Harp", "1,234")


def asked_about(prompt: str) -> tuple[Person, Relation]:
    """Whom and what a prompt's question is about."""
    question = "Question: " + prompt.split("Question: ")[1]
    for relation in RELATIONS:
        for phrasing in relation.phrasings:
            before, after = prompts.answering_prompt(phrasing).split("{name}")
            name = question.removeprefix(before).removesuffix(after)
            if question == f"{before}{name}{after}" and name.count(" ") == 1:
                return Person(*name.split()), relation
    raise AssertionError(prompt)


def stand_in(texts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
    """Completions of a model that does on every prompt what the sets are about."""
    assert max_new_tokens == 48
    written = []
    for text in texts:
        person, relation = asked_about(text)
        if not text.startswith("Question: "):
            value = text.splitlines()[0]
        elif person in WORLD.known:
            value = true_fact(WORLD, person, relation).value
        else:
            value = MADE_UP[RELATIONS.index(relation)]
        statement = relation.statement(person.name, value, 3)
        written.append((prompts.answering_completion(value, statement), True))
    return written


def count_letters(text: str) -> int:
    return len(text)
