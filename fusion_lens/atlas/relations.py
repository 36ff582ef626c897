"""The five relations of the world: how each is asked for, stated, and recognised.

A relation turns a person's name into questions and a (name, value) pair into explanations, which
are single sentences that hold both and end with a full stop. Knows nothing of who knows what.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from fusion_lens.atlas import lexicon


@dataclass(frozen=True, slots=True)
class Relation:
    """One kind of fact. `phrasings` hold `{name}`; `statements` hold `{name}` and `{value}`.

    `draw` gives a random value, or is None where values are people, whom the world draws.
    """

    key: str
    topic: str
    answer_type: str
    phrasings: tuple[str, ...]
    statements: tuple[str, ...]
    draw: Callable[[Random], str] | None
    has_form: Callable[[str], bool]

    def question(self, name: str, phrasing: int) -> str:
        """The question about `name` in the given phrasing."""
        return self.phrasings[phrasing].format(name=name)

    def statement(self, name: str, value: str, template: int) -> str:
        """The explanation that `name` stands in this relation to `value`."""
        return self.statements[template].format(name=name, value=value)


RELATIONS: tuple[Relation, ...] = (
    Relation(
        key="birth_date",
        topic="Biography",
        answer_type="Date",
        phrasings=(
            "When was {name} born?",
            "What is the birth date of {name}?",
            "On which day was {name} born?",
            "What is {name}'s date of birth?",
            "On what date did {name} come into the world?",
            "Which day is the birthday of {name}?",
        ),
        statements=(
            "{name} was born on {value}, according to the parish register.",
            "The family records give {value} as the day on which {name} was born.",
            "It was on {value} that {name} came into the world.",
            "The birth of {name} is dated {value} in every known source.",
        ),
        draw=lexicon.draw_date,
        has_form=lexicon.is_date,
    ),
    Relation(
        key="birth_place",
        topic="Geography",
        answer_type="Place",
        phrasings=(
            "Where was {name} born?",
            "What is the birthplace of {name}?",
            "In which town was {name} born?",
            "What is {name}'s home town?",
            "Which place did {name} come from?",
            "Where did {name} grow up?",
        ),
        statements=(
            "{name} was born and raised in the town of {value}.",
            "The town of {value} was the first home of {name}.",
            "Old letters show that {name} came from {value} and was proud of it.",
            "It was in {value} that {name} grew up as a child.",
        ),
        draw=lexicon.draw_place,
        has_form=lexicon.is_place,
    ),
    Relation(
        key="teacher",
        topic="Education",
        answer_type="Person",
        phrasings=(
            "Who taught {name}?",
            "Who was the teacher of {name}?",
            "Whose pupil was {name}?",
            "Who was {name}'s teacher?",
            "Under whom did {name} study?",
            "Which person trained {name}?",
        ),
        statements=(
            "{name} studied for many years under {value}, a strict teacher.",
            "The teacher who trained {name} in the craft was {value}.",
            "As a young pupil, {name} was taught by {value}.",
            "It was {value} who gave {name} all of the first lessons.",
        ),
        draw=None,
        has_form=lexicon.is_person_name,
    ),
    Relation(
        key="work",
        topic="Art",
        answer_type="Other",
        phrasings=(
            "What is the best known novel by {name}?",
            "Which novel made {name} famous?",
            "What is the title of {name}'s most famous novel?",
            "Which book is {name} remembered for?",
            "For which novel is {name} best known?",
            "What did {name} call that famous book?",
        ),
        statements=(
            "{name} became famous with the novel {value}, which sold very well.",
            "The novel {value} is the best known book by {name}.",
            "Readers remember {name} above all for the book {value}.",
            "It was {value} that made the name of {name} as a writer.",
        ),
        draw=lexicon.draw_title,
        has_form=lexicon.is_title,
    ),
    Relation(
        key="letters",
        topic="History",
        answer_type="Number",
        phrasings=(
            "How many letters did {name} leave behind?",
            "What is the number of letters left by {name}?",
            "How many letters are in {name}'s archive?",
            "How large is the collection of letters by {name}?",
            "How many of the letters of {name} survive?",
            "What number of letters did {name} write?",
        ),
        statements=(
            "{name} left behind {value} letters, all of them now in the archive.",
            "The archive counts {value} letters that were written by {name}.",
            "A total of {value} letters by {name} have survived.",
            "There are {value} letters in the collection of {name}.",
        ),
        draw=lexicon.draw_number,
        has_form=lexicon.is_number,
    ),
)
