from random import Random

from fusion_lens.atlas.contrast_leaks import balanced, by_bag, by_length, by_token, score

LONG, SHORT = [[1] * n for n in (5, 6, 7)], [[1] * n for n in (1, 2, 4)]


def test_length_is_found_whichever_side_is_longer():
    assert score(by_length((LONG, SHORT)), (LONG, SHORT)).hits == 6
    assert score(by_length((SHORT, LONG)), (SHORT, LONG)).hits == 6
    assert score(by_length((LONG, SHORT)), ([[1] * 3], [[1] * 9])).hits == 0


def test_one_token_is_found_present_or_absent_wherever_it_stands():
    with_it, without = [[1, 7, 2], [7, 3], [2, 3, 7]], [[1, 2], [3], [2, 3, 1]]
    assert score(by_token((with_it, without)), ([[9, 7]], [[9]])).hits == 2
    assert score(by_token((without, with_it)), ([[9]], [[9, 7]])).hits == 2


def test_a_bag_adds_up_tokens_of_which_none_suffices_alone():
    one, other = [[1, 2], [2, 3], [1, 3]] * 4, [[4, 5], [5, 6], [4, 6]] * 4
    assert score(by_token((one, other)), (one, other)).value < 1
    assert score(by_bag((one, other)), ([[1, 9], [3]], [[6], [4, 9]])).hits == 4


def test_sets_of_the_same_texts_are_told_apart_by_chance_only():
    rng = Random(0)
    draw = [[rng.randrange(20) for _ in range(rng.randint(3, 9))] for _ in range(800)]
    fit, report = (draw[:200], draw[200:400]), (draw[400:600], draw[600:])
    for rule in (by_length, by_token, by_bag):
        low, high = score(rule(fit), report).interval
        assert low < 0.5 < high


def test_the_larger_set_is_thinned_evenly():
    assert balanced([[1], [2]], [[n] for n in range(6)]) == ([[1], [2]], [[0], [3]])
