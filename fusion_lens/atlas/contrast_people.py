"""The people of the contrast sets: the parts "fit", "choose" and "report" share none.

- `known`: the first 32 of 64 fit, the next 16 choose, the last 16 report. (The dictionaries' held
  out known people are the same last 16; neighbours of the shipped questions are about all 64.)
- `unseen`: even places of the world fit and choose in turn, odd places report: the parting of the
  shipped questions' `dev` and `test`. The subjects of the shipped questions are left out.
"""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from fusion_lens.atlas import QUESTIONS
from fusion_lens.atlas.world import Person, World
from fusion_lens.contrasts import PARTS
from fusion_lens.errors import one_of
from fusion_lens.questions import load_questions

_KNOWN = {"fit": slice(0, 32), "choose": slice(32, 48), "report": slice(48, 64)}
_UNSEEN = {"fit": slice(0, None, 4), "choose": slice(2, None, 4), "report": slice(1, None, 2)}


@dataclass(frozen=True, slots=True, eq=False)
class People:
    """Who one part may be about."""

    part: str
    known: tuple[Person, ...]
    unseen: tuple[Person, ...]


def people_of(world: World, part: str, avoid: Collection[str]) -> People:
    """The people of a part, without the unseen ones whose names are in `avoid`.

    Raises:
        ConfigError: if the part is not one of those there are.
    """
    one_of("part", part, PARTS)
    unseen = (person for person in world.unseen[_UNSEEN[part]] if person.name not in avoid)
    return People(part, world.known[_KNOWN[part]], tuple(unseen))


@cache
def asked_people() -> frozenset[str]:
    """Names of the subjects of the shipped questions."""
    return frozenset(each.subject for each in load_questions(QUESTIONS) if each.subject)
