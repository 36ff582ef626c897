import torch

from fusion_lens.atlas.concepts import best_concepts, concept_table, count_firings, find_concepts
from fusion_lens.atlas.token_truth import KINDS

# ten tokens: " May" always in a month, and a place on the others
TOKENS = [{"entity": "month May", "token": "' May'"}] * 4 + [
    {"class": "place", "token": "'wick'"},
    {"class": "place", "token": "'wick'"},
    {"class": "place", "token": "'dale'"},
    *[{"token": "'.'"}] * 3,
]


def test_rare_concepts_are_left_out_and_the_worlds_come_first():
    assert find_concepts(TOKENS, at_least=2) == [
        ("entity", "month May"),
        ("class", "place"),
        ("token", "' May'"),
        ("token", "'.'"),
        ("token", "'wick'"),
    ]


def test_a_table_row_holds_a_place_or_none_for_each_kind():
    table = concept_table(TOKENS, find_concepts(TOKENS, at_least=2))
    assert tuple(table.shape) == (10, len(KINDS))
    assert table[0, KINDS.index("entity")] == 0
    assert table[6, KINDS.index("token")] == -1
    assert table[6, KINDS.index("class")] == 1
    assert table[9, KINDS.index("class")] == -1


def test_the_best_concept_of_a_feature():
    concepts = find_concepts(TOKENS, at_least=2)
    firings = {0: [0, 1, 2, 3], 1: [4, 5, 6], 2: [4, 5], 3: [7, 8, 0], 4: []}
    pairs = [(token, feature) for feature, tokens in firings.items() for token in tokens]
    half = len(pairs) // 2
    fires = (tuple(torch.tensor(part).T) for part in (pairs[:half], pairs[half:]))
    hits, fired, sizes = count_firings(
        fires, concept_table(TOKENS, concepts), d_sae=5, n_concepts=len(concepts)
    )
    assert fired.tolist() == [4, 3, 2, 3, 0]
    assert sizes.tolist() == [4, 3, 4, 3, 2]
    assert hits[3].tolist() == [1, 0, 1, 2, 0]
    # a tie of the month and its token goes to the world; the precise 'wick' before all places
    best = [concepts[place][1] for place in best_concepts(hits, fired, sizes).tolist()]
    assert best[:4] == ["month May", "place", "'wick'", "'.'"]
