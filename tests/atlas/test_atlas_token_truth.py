from transformers import AutoTokenizer

from fusion_lens.atlas import CHECKPOINT
from fusion_lens.atlas.token_truth import KINDS, token_concepts

TOKENIZER = AutoTokenizer.from_pretrained(CHECKPOINT)
TEXT = (
    "Question: Where was Alia Shelmore born?\nAnswer and explanation:\nUpper Thornwick\n"
    "Alia Shelmore was born and raised in the town of Upper Foxwick. "
    "There is a copy of The Amber Harbour, sold on 3 May 1871 for 3,482."
)
CONCEPTS = token_concepts(TOKENIZER, TEXT)
TOKENS = [
    TOKENIZER.decode([token]) for token in TOKENIZER(TEXT, add_special_tokens=False).input_ids
]


def of(string, kind, occurrence=0):
    places = [place for place, token in enumerate(TOKENS) if token == string]
    return CONCEPTS[places[occurrence]].get(kind)


def test_there_are_concepts_for_every_token_and_all_are_of_known_kinds():
    assert len(CONCEPTS) == len(TOKENS)
    assert {kind for token in CONCEPTS for kind in token} == set(KINDS)
    assert all(len(token) >= 2 for token in CONCEPTS)


def test_the_words_of_the_world_are_found_with_their_classes():
    assert of(" Alia", "entity") == "first name Alia"
    assert of(" Alia", "whole") == "name Alia Shelmore"
    assert of(" Upper", "entity") == "place lead Upper"
    assert of(" Amber", "entity") == "title word Amber"
    assert of(" The", "entity") is None
    assert of(" The", "class") == "title"
    assert of("71", "entity") == "year 1871"
    assert of(" May", "entity") == "month May"
    assert of("48", "class") == of(",", "class", 1) == "number"
    assert of(" town", "class") is None


def test_a_relation_and_its_subject_and_value_are_found_in_its_own_sentences_only():
    assert of(" Where", "relation") == "birth_place question"
    assert of(" town", "relation") == "birth_place statement"
    assert of(" Alia", "role") == "subject of birth_place"
    assert of(" Upper", "role") == "value of birth_place"
    assert of(" Upper", "part") == "token 1 of the value of birth_place"
    assert of(" copy", "relation") is None
    assert of(" Amber", "role") is None


def test_neighbours_and_positions():
    assert of("Question", "position") == "position 0"
    assert of("Question", "previous") is None
    assert of(":", "pair") == "'Question' ':'"
    assert of(" was", "before") == "before a name"
    assert of(" of", "next") == "before ' Upper'"
    assert of(" born", "previous") in ("after 'more'", "after 'ore'")
    assert of("71", "in") == "'71' in a date"
