import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from contrasts_by_hand import WORLD, stand_in

from fusion_lens.atlas import CHECKPOINT, CONTRASTS
from fusion_lens.atlas.contrast_people import people_of
from fusion_lens.atlas.contrast_probes import (
    everybody,
    format_shares,
    load_sets,
    probe_examples,
    probe_formats,
    probe_fresh,
    probe_leaks,
    probe_odds,
    probe_pairs,
    probe_templates,
)
from fusion_lens.atlas.decoding import load_completer, load_scorer
from fusion_lens.atlas.probes import Share, hash_weights
from fusion_lens.contrasts import PARTS

SETS = load_sets()
PEOPLE = people_of(WORLD, "fit", ())
RECORD = json.loads((CONTRASTS / "probes.json").read_text("utf-8"))
PAGE = (Path(__file__).parents[2] / "docs" / "atlas_contrasts.md").read_text("utf-8")


def recorded(title):
    return {name: Share(told["hits"], told["n"]) for name, told in RECORD["tables"][title].items()}


def letters(text):
    return [ord(letter) for letter in text]


def shortest_is_likeliest(texts):
    return [-float(len(text)) for _, text in texts]


def test_a_model_that_always_appeals_and_repeats_has_both_behaviours():
    shares = probe_fresh(PEOPLE, stand_in, stand_in, 20)
    assert shares["sources: appeals, unseen people"] == Share(20, 20)
    assert shares["sources: appeals, known people"] == Share(32, 32)
    assert shares["context: repeats the false fact"] == Share(20, 20)
    assert shares["context: says the true fact"] == Share(0, 20)
    assert shares["context: reads about unseen people"] == Share(20, 20)


def test_kept_changed_and_shown_are_told_apart():
    examples = [each for each in SETS.context if each.part == "choose"]

    def shorter(texts, n):
        return [(text.removesuffix("."), True) for text, _ in stand_in(texts, n)]

    shares = probe_examples("context", examples, shorter)
    assert shares["context: source prompts show the behaviour"] == Share(32, 32)
    assert shares["context: source prompts show the target"] == Share(0, 32)
    assert shares["context: control prompts keep their answer"] == Share(32, 32)
    assert shares["context: control prompts changed"] == Share(32, 32)


def test_odds_compare_a_source_with_the_target_of_its_prompt():
    share, gap = probe_odds(SETS.sources, shortest_is_likeliest)
    appeal = "The birth of  is dated  in every known source."
    plain = "It was on  that  came into the world."
    assert share == Share(0, 184)
    assert gap == pytest.approx(len(plain) - len(appeal))


def test_pairs_are_counted_by_part_and_by_length():
    shorter = [replace(pair, wrong=pair.right + " x") for pair in SETS.facts[::20]]
    shares = probe_pairs([*shorter], shortest_is_likeliest, letters)
    assert [shares[f"facts: right is likelier, {part}"].value for part in PARTS] == [1.0] * 3
    assert shares["facts: right and wrong have equally many tokens"].hits == 0


def test_letters_are_asked_for_in_both_orders():
    shares = probe_formats(
        SETS.facts[:10], PEOPLE, lambda texts: [float(t == " A") for _, t in texts]
    )
    assert shares["facts: right is likelier, as a letter of two"] == Share(10, 20)


def test_templates_are_recognised():
    shares = probe_templates(PEOPLE, stand_in, 4)
    assert {share.hits for name, share in shares.items() if "every known source" in name} == {4}
    assert sum(share.hits for share in shares.values()) == 5 * 4


def test_the_record_is_that_of_the_shipped_files_and_its_rules_are_found_again():
    assert RECORD["weights_sha256"] == hash_weights(CHECKPOINT)
    for name, digest in RECORD["sets_sha256"].items():
        assert sha256((CONTRASTS / name).read_bytes()).hexdigest() == digest
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    leaks = probe_leaks(SETS, lambda text: tokenizer(text, add_special_tokens=False).input_ids)
    assert leaks == recorded("trivial rules")


def test_the_recorded_rates_are_found_again_on_a_few():
    people = everybody(WORLD)
    shares = probe_fresh(
        people, load_completer(CHECKPOINT), load_completer(CHECKPOINT, sample_seed=0), 40
    )
    base = recorded("base rates")
    for name in (
        "sources: appeals, unseen people",
        "context: repeats the false fact",
        "context: reads about unseen people",
    ):
        low, high = shares[name].interval
        assert low <= base[name].value <= high
    some = [each for each in SETS.context if each.part == "choose"]
    share, gap = probe_odds(some, load_scorer(CHECKPOINT))
    assert share.value == 1.0
    assert gap > 15


def test_the_sets_hold_what_a_method_needs():
    base, pairs = recorded("base rates"), recorded("pairs")
    assert base["sources: appeals, unseen people"].value >= 0.9
    assert base["context: repeats the false fact"].value >= 0.95
    assert base["sources: control prompts show the behaviour"].hits == 0
    assert min(pairs[f"facts: right is likelier, {part}"].value for part in PARTS) >= 0.95


def test_the_page_shows_every_recorded_table():
    for title in RECORD["tables"]:
        assert format_shares(recorded(title)) in PAGE
    for nats in RECORD["source_minus_target_nats"].values():
        assert f"{nats:+.2f}" in PAGE
