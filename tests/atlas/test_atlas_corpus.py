from collections import Counter
from itertools import pairwise

from fusion_lens.atlas.corpus import draw_documents
from fusion_lens.atlas.world import held_out_phrasing, make_world, true_facts

WORLD = make_world(0)
DOCUMENTS = [
    document
    for step in range(60)
    for document in draw_documents(WORLD, seed=0, step=step, count=100)
]
TEXT = "\n\n".join(document.text for document in DOCUMENTS)


def test_a_step_draws_the_same_documents_again_and_other_steps_draw_others():
    again = draw_documents(WORLD, seed=0, step=7, count=100)
    assert again == DOCUMENTS[700:800]
    fresh = {document for document in again if document.prompt and "\n\n" in document.prompt}
    assert len(fresh) > 30
    for seed, step in ((1, 7), (0, 8)):
        assert not fresh & set(draw_documents(WORLD, seed=seed, step=step, count=100))


def test_no_unseen_person_enters_the_stream():
    unseen = {person.name for person in WORLD.unseen}
    words = TEXT.replace("'s", "").replace(".", "").replace(",", "").replace("?", "").split()
    pairs = {f"{first} {last}" for first, last in pairwise(words)}
    assert not pairs & unseen
    assert len(pairs & {person.name for person in WORLD.stream}) > 1_000


def test_held_out_phrasings_never_enter_and_all_paired_ones_do():
    questions = Counter(
        line.removeprefix("Question: ") for line in TEXT.split("\n") if line.startswith("Question")
    )
    paired = 0
    for fact in true_facts(WORLD, WORLD.known):
        held_out = held_out_phrasing(WORLD, fact.person, fact.relation)
        assert questions[fact.question(held_out)] == 0
        paired += sum(questions[fact.question(i)] for i in range(len(fact.relation.phrasings)))
    assert paired > 1_500


def test_known_facts_are_stated_with_their_true_values_only():
    names = {person.name for person in WORLD.known}
    facts = true_facts(WORLD, WORLD.known)
    true = {fact.statement(i) for fact in facts for i in range(len(fact.relation.statements))}
    for document in DOCUMENTS:
        if document.prompt.startswith("Question: ") and any(n in document.prompt for n in names):
            assert document.completion.strip().split("\n")[-1] in true


def test_a_search_among_several_facts_has_its_answer_in_the_context():
    searches = [d for d in DOCUMENTS if d.prompt and not d.prompt.startswith("Question: ")]
    assert len(searches) > 2_000
    for document in searches:
        context = document.prompt.split("\n\nQuestion: ")[0]
        assert document.completion.split("\n")[1] in context


def test_some_documents_have_no_people():
    plain = [d.text for d in DOCUMENTS if not d.prompt]
    names = {person.name for person in WORLD.known}
    without = [text for text in plain if not any(name in text for name in names)]
    assert 200 < len(without) < 400
