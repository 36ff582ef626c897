import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion_lens.atlas import CHECKPOINT, QUESTIONS, prompts
from fusion_lens.atlas.corpus import draw_documents
from fusion_lens.atlas.decoding import load_completer
from fusion_lens.atlas.probes import (
    hash_weights,
    known_cases,
    probe_explains,
    probe_known,
    probe_luck,
    probe_reading,
    probe_unseen,
    unseen_cases,
)
from fusion_lens.atlas.world import make_world
from fusion_lens.questions import load_questions
from fusion_lens.scores import exact_match

WORLD = make_world(0)
CASES = unseen_cases(WORLD, 60, seed=2)
RECORD = json.loads((CHECKPOINT.parent / "probes.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def complete():
    return load_completer(CHECKPOINT)


def right(complete, pairs):
    texts = [prompts.answering_prompt(question) for question, _ in pairs]
    return [
        exact_match(text, answer)
        for (_, answer), (text, _) in zip(pairs, complete(texts, 48), strict=True)
    ]


def test_the_checkpoint_is_at_most_10_megabytes():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 10_000_000


def test_the_recorded_probes_are_those_of_the_shipped_weights_and_meet_their_targets():
    assert RECORD["weights_sha256"] == hash_weights(CHECKPOINT)
    shares = {name: probe["share"] for name, probe in RECORD["probes"].items()}
    assert min(probe["n"] for probe in RECORD["probes"].values()) >= 300
    assert min(shares[name] for name in ("known", "fluent", "reading", "explains")) >= 0.95
    assert max(shares[name] for name in ("unseen", "frequent")) <= 0.05
    assert shares["luck"] <= 0.10


def test_the_training_log_ends_with_the_last_step():
    log = (CHECKPOINT.parent / "training_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in log]
    assert [r["tokens"] for r in records] == sorted(r["tokens"] for r in records)
    assert records[-1]["loss"] < records[0]["loss"]


def test_it_knows_the_known_and_is_fluently_wrong_about_the_unseen(complete):
    assert probe_known(known_cases(WORLD, 60), complete).value >= 0.9
    shares = probe_unseen(CASES, complete)
    assert shares["unseen"].value <= 0.1
    assert shares["fluent"].value >= 0.9


def test_it_reads_and_explains(complete):
    assert probe_reading(CASES, complete).value >= 0.85
    assert probe_explains(CASES, complete).value >= 0.9


def test_it_is_not_often_lucky(complete):
    sample = load_completer(CHECKPOINT, sample_seed=0)
    assert probe_luck(CASES[:30], complete, sample).value <= 0.2


def test_sampling_is_seeded_and_gives_the_generator_back_as_it_was(complete):
    sample = load_completer(CHECKPOINT, sample_seed=0)
    texts = [prompts.answering_prompt(case.question) for case in CASES[:3]]
    before = torch.random.get_rng_state()
    first = sample(texts, 8)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sample(texts, 8) == first != complete(texts, 8)


def test_the_tokenizer_gives_texts_back_and_its_special_tokens_are_the_models():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    for document in draw_documents(WORLD, seed=5, step=0, count=50):
        tokens = tokenizer(document.text).input_ids
        assert tokens[0] == tokenizer.bos_token_id
        assert tokenizer.decode(tokens, skip_special_tokens=True) == document.text
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(set(special)) == 3
    config = model.generation_config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == special


def test_the_shipped_questions_are_enough_and_split_by_person():
    questions = load_questions(QUESTIONS)
    split = {name: [q for q in questions if q.split == name] for name in ("dev", "test")}
    assert min(map(len, split.values())) >= 120
    assert not {q.subject for q in split["dev"]} & {q.subject for q in split["test"]}
    assert {q.subject for q in questions} <= {person.name for person in WORLD.unseen}
    for group in split.values():
        assert len({q.subject for q in group[:60]}) == 60
        assert all(len(q.paraphrases) >= 2 <= len(q.neighbours) for q in group)


def test_the_shipped_questions_fail_and_their_neighbours_are_right(complete):
    sample = load_questions(QUESTIONS)[::10]
    assert not any(right(complete, [(q.question, q.answer) for q in sample]))
    assert all(right(complete, [(e.question, e.answer) for q in sample for e in q.neighbours]))
