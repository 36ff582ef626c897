from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from lent import lent

from fusion_lens.controls import towards_unembedding, turned
from fusion_lens.generation import GenerationConfig
from fusion_lens.lenders import Lenders
from fusion_lens.models import HookedModel
from fusion_lens.preparation import TuningConfig, prepare, seed_of
from fusion_lens.prompts import tokenize
from fusion_lens.questions import Question
from fusion_lens.units import consistent

CONFIG = TuningConfig(
    generation=GenerationConfig(max_new_tokens=8, slots=8, cache_length=64), explanation_tokens=4
)
QUESTIONS = [
    Question("a", "Who wrote the red book?", "Ada Lovelace", answer_type="Person"),
    Question("b", "Who was at home?", "Tom Harris", answer_type="Person"),
    Question("c", "Who sat in the house?", "a cat", answer_type="Person"),
    Question("d", "When was Tom born?", "3 May 1901", answer_type="Date"),
]


@pytest.fixture(scope="module")
def lenders(tiny: HookedModel) -> Iterator[Lenders]:
    with lent(tiny, CONFIG, QUESTIONS, "abcd") as made:
        yield made


def test_every_question_is_prepared_as_it_would_be_alone(
    tiny: HookedModel, lenders: Lenders
) -> None:
    assert sorted(lenders.prepared) == ["a", "b", "c", "d"]
    for question in QUESTIONS:
        alone = prepare(tiny, [question], CONFIG)[0][0]
        item = lenders.prepared[question.id]
        assert (item.prompt, item.reference, item.explanation) == (
            alone.prompt,
            alone.reference,
            alone.explanation,
        )
        assert torch.equal(item.deltas.reference, alone.deltas.reference)
        assert torch.equal(item.deltas.base, alone.deltas.base)


def test_each_kind_of_vector_is_lent(tiny: HookedModel, lenders: Lenders) -> None:
    item = lenders.prepared["a"]
    others = [lenders.prepared[name].deltas.vectors for name in "bcd"]
    assert lenders.lend("own", item, tiny) is item.deltas
    generic = lenders.lend("generic", item, tiny)
    assert torch.allclose(generic.vectors, sum(others) / 3, atol=1e-6)
    donor = lenders.donors["a"].id
    assert donor in ("b", "c")
    mismatched = lenders.lend("mismatched", item, tiny)
    assert torch.equal(mismatched.vectors, lenders.prepared[donor].deltas.vectors)
    assert mismatched.layout == item.deltas.layout
    random = lenders.lend("random", item, tiny)
    assert torch.equal(random.vectors, turned(item.deltas, seed_of(0, "a", "random")).vectors)
    gold = tokenize(tiny, " Ada Lovelace", prepend_bos=False).tokens
    unembed = lenders.lend("unembed", item, tiny)
    expected = towards_unembedding(tiny, item.deltas, gold)
    assert torch.equal(unembed.vectors, expected.vectors)


def test_who_is_alone_in_its_type_has_no_donor(tiny: HookedModel, lenders: Lenders) -> None:
    assert lenders.lend("mismatched", lenders.prepared["d"], tiny) is None
    assert lenders.lend("generic", lenders.prepared["d"], tiny) is not None


def test_centred_deltas_lack_the_generic_one(tiny: HookedModel, lenders: Lenders) -> None:
    with lent(tiny, CONFIG, QUESTIONS, "abcd", centre=True) as centred:
        item = centred.prepared["a"]
        generic = centred.lend("generic", item, tiny).vectors
        own = centred.lend("own", item, tiny).vectors
        assert torch.allclose(own, item.deltas.vectors - generic, atol=1e-6)
        donor = centred.prepared[centred.donors["a"].id]
        given = centred.lend("mismatched", item, tiny).vectors
        # without the question that is lent to: else it would push away from its own delta
        others = [p.deltas.vectors for p in centred.prepared.values() if p not in (item, donor)]
        assert torch.allclose(given, donor.deltas.vectors - sum(others) / 2, atol=1e-6)
        random = centred.lend("random", item, tiny)
        assert torch.allclose(random.norms, centred.lend("own", item, tiny).norms, rtol=1e-4)


def test_a_question_alone_lends_nothing_generic(tiny: HookedModel) -> None:
    with lent(tiny, CONFIG, QUESTIONS[:1], "a", centre=True) as alone:
        item = alone.prepared["a"]
        assert alone.share(item) is None
        for kind in ("own", "generic", "mismatched", "random", "unembed"):
            assert alone.lend(kind, item, tiny) is None


def test_who_is_no_donor_lends_nothing_and_is_lent_to(tiny: HookedModel) -> None:
    with lent(tiny, CONFIG, QUESTIONS[:3], "bc") as some:
        assert some.generic.of == {"b", "c"}
        item = some.prepared["a"]
        expected = (some.prepared["b"].deltas.vectors + some.prepared["c"].deltas.vectors) / 2
        assert torch.allclose(some.lend("generic", item, tiny).vectors, expected, atol=1e-6)
        assert some.lend("mismatched", item, tiny) is None
        assert set(some.donors) == {"b", "c"}


def test_a_failed_question_is_kept_with_its_reason_and_lends_nothing(tiny: HookedModel) -> None:
    broken = replace(QUESTIONS[1], answer="</s>")
    with lent(tiny, CONFIG, [QUESTIONS[0], broken]) as some:
        assert set(some.prepared) == {"a"}
        assert some.failures["b"].error == "SpanError"
        assert "must be found" in some.failures["b"].message
        assert some.generic.of == {"a"}
        assert some.donors == {}


def test_the_means_lie_in_a_file_that_goes_with_the_run(
    tiny: HookedModel, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with lent(tiny, CONFIG, QUESTIONS):
        sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*/*"))]
        # three questions, then one: two means of 4 layers and 32 dimensions in float32
        assert sizes == [3 * 2 * 4 * 32 * 4, 2 * 4 * 32 * 4]
    assert not list(tmp_path.iterdir())


def test_blocks_of_any_size_lend_the_same_to_the_last_bit(tiny: HookedModel) -> None:
    with lent(tiny, CONFIG, QUESTIONS, size=1) as one, lent(tiny, CONFIG, QUESTIONS) as three:
        assert torch.equal(one.generic.total, three.generic.total)
        assert one.donors == three.donors
        for name in "abcd":
            ranked = [some.ranking(some.prepared[name]) for some in (one, three)]
            assert torch.equal(*ranked)


@pytest.mark.parametrize("centre", [False, True])
def test_some_questions_are_lent_the_same_without_the_others(
    tiny: HookedModel, centre: bool
) -> None:
    with lent(tiny, CONFIG, QUESTIONS, centre=centre) as everyone:
        some = pickle.loads(pickle.dumps(everyone.only(["a", "d"])))
        assert set(some.prepared) == {"a", "d", everyone.donors["a"].id}
        for name in "ad":
            own, other = everyone.prepared[name], some.prepared[name]
            for kind in ("own", "generic", "mismatched", "random", "unembed"):
                lent_to = everyone.lend(kind, own, tiny), some.lend(kind, other, tiny)
                if lent_to[0] is None:
                    assert lent_to[1] is None
                else:
                    assert torch.equal(lent_to[0].vectors, lent_to[1].vectors)
            assert torch.equal(everyone.ranking(own), some.ranking(other))
            assert torch.equal(everyone.share(own), some.share(other))
        # no more of the file goes along than the questions' own
        assert some.prepared["a"].deltas.base.untyped_storage().nbytes() == 4 * 32 * 4


def test_a_ranking_counts_every_question_but_the_ones_own(lenders) -> None:
    everyone = [item.deltas for item in lenders.prepared.values()]
    for name, item in lenders.prepared.items():
        others = [own.deltas for other, own in lenders.prepared.items() if other != name]
        assert len(others) == len(everyone) - 1 >= 2
        assert torch.equal(lenders.ranking(item), consistent(others).ranking)
    rankings = [lenders.ranking(item) for item in lenders.prepared.values()]
    assert not torch.equal(rankings[0], rankings[1])
