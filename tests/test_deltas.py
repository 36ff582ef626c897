from __future__ import annotations

import pytest
import torch
from conftest import deltas_of, prompts_of

from fusion_lens.activations import record
from fusion_lens.deltas import Deltas, deltas_from_caches, make_deltas
from fusion_lens.errors import ActivationError
from fusion_lens.models import HookedModel, load_model
from fusion_lens.prompts import question_prompt, reference_prompt


def test_vectors_are_reference_minus_base_and_norms_are_theirs(tiny) -> None:
    made = deltas_of(tiny)
    assert torch.equal(made.vectors, made.reference - made.base)
    by_hand = [float(sum(x * x for x in row.tolist()) ** 0.5) for row in made.vectors]
    assert made.norms.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert min(by_hand) > 0.1


def test_the_algebra_holds(tiny) -> None:
    d, e = deltas_of(tiny), deltas_of(tiny, "When was Tom born?")
    assert torch.equal((d - d).vectors, torch.zeros(4, 32))
    assert torch.equal(((-d) * -2).vectors, (2 * d).vectors)
    assert torch.equal((d * 0).vectors, torch.zeros(4, 32))
    assert torch.allclose((d + e).vectors, d.vectors + e.vectors, atol=1e-6)
    assert (d + e).layout == d.layout


def test_caches_of_the_users_give_the_same_deltas(tiny) -> None:
    question = "Who wrote the red book?"
    reference = reference_prompt(tiny, question, "Ada Lovelace", "She wrote it in 1843.")
    base = question_prompt(tiny, question)
    _, reference_cache = tiny.run_with_cache(torch.tensor([reference.tokens]))
    _, base_cache = tiny.run_with_cache(torch.tensor([base.tokens]))
    made = deltas_from_caches(reference_cache, base_cache, reference=reference, base=base)
    assert torch.allclose(made.vectors, deltas_of(tiny).vectors, atol=1e-5)
    assert made.layout == base.layout


def test_two_models_do_not_mix(tiny, other_folder) -> None:
    other = load_model(other_folder)
    one, two = (record(m, [question_prompt(m, "Who?")])[0] for m in (tiny, other))
    with pytest.raises(ActivationError, match="both sides must come from one model, but it was"):
        make_deltas(one, two)
    with pytest.raises(ActivationError, match="both sides must come from one model"):
        deltas_of(tiny) + deltas_of(other)


def test_deltas_that_are_not_finite_are_refused(tiny) -> None:
    d = deltas_of(tiny)
    with pytest.raises(ActivationError, match="reference must be finite"):
        Deltas(reference=d.reference * float("inf"), base=d.base, layout=d.layout, model=d.model)
    with pytest.raises(ActivationError, match="base must be on the CPU in float32 or float64, but"):
        Deltas(reference=d.reference, base=d.base.half(), layout=d.layout, model=d.model)


def test_deltas_show_norms_per_layer_beside_what_they_start_from(tiny) -> None:
    deltas = deltas_of(tiny)
    norm, base = float(deltas.norms[2]), float(deltas.base[2].norm())
    assert float(deltas.relative_norms[2]) == pytest.approx(norm / base)
    table = deltas.table()
    assert table.rows[2][:4] == ("2", f"{norm:.2f}", f"{base:.2f}", f"{norm / base:.2f}")
    below, own = deltas.vectors[1], deltas.vectors[2]
    cosine = float(below @ own / (below.norm() * own.norm()))
    assert [row[4] for row in table.rows][:3:2] == ["-", f"{cosine:+.2f}"]
    assert repr(deltas).startswith("Deltas(")
    assert "tensor" not in repr(deltas)


def test_deltas_take_no_more_along_than_their_means(tiny: HookedModel) -> None:
    reference, base = record(tiny, prompts_of(tiny)[:2])
    made = make_deltas(reference, base)
    size = made.reference.numel() * made.reference.element_size()
    for mean in (made.reference, made.base):
        assert mean.untyped_storage().nbytes() == size
