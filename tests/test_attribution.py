from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from conftest import prompts_of, strong_plan
from crosscoders import made
from dictionaries import parts, relative_gap, residuals, save_sae
from kinds import gate_of
from torch import Tensor

from fusion_lens.attribution import Attribution, attribute, effects_between
from fusion_lens.dictionaries import Card, Dictionary, Encoded
from fusion_lens.errors import ConfigError, DictionaryError
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan
from fusion_lens.saes import load_sae
from fusion_lens.teacher_forcing import Text, record_streams

WRITTEN = (40, 41, 42, 43)


@dataclass(frozen=True)
class Linear:
    """Codes are the coordinates in orthonormal directions of different lengths: nothing is lost
    that they span, and a code may be negative."""

    card: Card
    decoder: Tensor

    def to_basis(self, x: Tensor) -> Tensor:
        return x

    def encode(self, x: Tensor) -> Encoded:
        squares = self.decoder.square().sum(dim=(0, 2))
        codes = torch.einsum("bld,lfd->bf", x, self.decoder) / squares
        ones = torch.ones(x.shape[:2])
        return Encoded(codes, ones, torch.zeros_like(x))

    def reconstruct(self, x: Tensor) -> Tensor:
        return torch.einsum("bf,lfd->bld", self.encode(x).codes, self.decoder)


def linear(
    layers: tuple[int, ...] = (1,), d_model: int = 4, n: int = 3, name: str = "linear"
) -> Linear:
    """Feature i is i + 1 times an orthonormal direction over all layers."""
    generator = torch.Generator().manual_seed(0)
    width = len(layers) * d_model
    frame = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q.T[:n]
    sized = frame * torch.arange(1, n + 1)[:, None]
    decoder = sized.view(n, len(layers), d_model).transpose(0, 1).contiguous()
    hooks = tuple(f"blocks.{layer}.hook_resid_post" for layer in layers)
    return Linear(Card(name, layers, hooks, d_model, n), decoder)


def test_coordinates_of_a_change_are_its_effects() -> None:
    dictionary = linear()
    units = dictionary.decoder[0] / torch.tensor([[1.0], [2.0], [3.0]])
    x = torch.randn(5, 1, 4)
    y = x + 3.0 * units[0] - 4.0 * units[2]
    found = effects_between(dictionary, x, y)
    assert found.features == (0, 1, 2)
    assert torch.allclose(found.effects, torch.tensor([3.0, 0.0, -4.0]), atol=1e-5)
    assert torch.allclose(found.shares, torch.tensor([0.36, 0.0, 0.64]), atol=1e-6)
    assert torch.allclose(found.token_effects, torch.tensor([[3.0, 0.0, -4.0]] * 5), atol=1e-5)
    assert (found.relative_error, found.cosine) == (
        pytest.approx(0.0, abs=1e-6),
        pytest.approx(1.0),
    )
    assert found.norms == {1: pytest.approx(5.0)}


def test_what_no_direction_spans_is_error() -> None:
    dictionary = linear(n=3)
    spanned = dictionary.decoder[0] / dictionary.decoder[0].norm(dim=-1, keepdim=True)
    rest = torch.linalg.svd(spanned, full_matrices=True).Vh[-1]
    x = torch.randn(2, 1, 4)
    found = effects_between(dictionary, x, x + 3.0 * spanned[1] + 4.0 * rest)
    assert found.relative_error == pytest.approx(0.8)
    assert found.cosine == pytest.approx(0.6)
    assert torch.allclose(found.error[0], 4.0 * rest, atol=1e-5)
    assert found.shares.sum() == pytest.approx(0.36)


def test_a_feature_of_several_layers_has_one_effect_over_them() -> None:
    dictionary = linear((0, 2), n=3)
    direction = dictionary.decoder[:, 1]  # of norm 2 over both layers
    x = torch.randn(3, 2, 4)
    found = effects_between(dictionary, x, x - 2.5 * direction)
    (top, *_) = found.top(1)
    assert (top.feature, top.layer) == (1, None)
    assert top.effect == pytest.approx(-5.0, abs=1e-4)
    assert top.share == pytest.approx(1.0, abs=1e-5)
    assert torch.allclose(found.contributions[1], -2.5 * direction, atol=1e-5)
    parts = [-2.5 * float(direction[n].norm()) for n in range(2)]
    assert dict(top.per_layer) == {0: pytest.approx(parts[0]), 2: pytest.approx(parts[1])}


def test_means_are_over_the_tokens_that_count() -> None:
    dictionary = linear()
    unit = dictionary.decoder[0, 0]
    x = torch.zeros(3, 1, 4)
    y = torch.stack([unit * size for size in (1.0, 2.0, 6.0)])[:, None]
    counted = torch.tensor([True, False, True])
    found = effects_between(dictionary, x, y, counted)
    assert found.effects[0] == pytest.approx(3.5)
    assert found.token_effects[:, 0].tolist() == pytest.approx([1.0, 2.0, 6.0])
    with pytest.raises(DictionaryError, match="must be a token to take a mean over"):
        effects_between(dictionary, x, y, torch.zeros(3, dtype=torch.bool))


def test_a_change_of_nothing_has_no_shares() -> None:
    x = torch.randn(2, 1, 4)
    top = effects_between(linear(), x, x).top(2)
    assert [each.effect for each in top] == [0.0, 0.0]
    assert [each.share for each in top] == [None, None]
    nothing = Attribution((effects_between(linear(), x, x),), ("a", "b"), (True, True), ())
    assert (nothing.relative_error, nothing.cosine) == (None, None)
    assert nothing.to_dict()["dictionaries"][0]["relative_error"] is None
    assert "relative error -" in nothing._repr_html_()


@pytest.mark.parametrize(
    ("kind", "normalisation"),
    [
        ("standard", "none"),
        ("jumprelu", "layer_norm"),
        ("gated", "constant_norm_rescale"),
        ("abstopk", "layer_norm"),
        ("batchtopk", "folded"),
        ("matching_pursuit", "none"),
    ],
)
def test_contributions_offset_and_error_sum_to_the_change(
    tmp_path, kind: str, normalisation: str
) -> None:
    dictionary = load_sae(save_sae(tmp_path, kind, normalisation))
    x, y = residuals(0), residuals(1)
    found = effects_between(dictionary, x, y)
    assert found.gap < 1e-4
    by_feature = parts(dictionary, x, y).effects.mean(dim=0)
    assert relative_gap(found.contributions, by_feature[list(found.features)]) < 1e-4 or (
        torch.allclose(found.contributions, by_feature[list(found.features)], atol=1e-5)
    )
    silent = sorted(set(range(len(by_feature))) - set(found.features))
    assert not by_feature[silent].any()
    order = torch.randperm(len(found.features), generator=torch.Generator().manual_seed(0))
    assert replace(found, directions=found.directions[order]).gap > 0.01


ONE_CARD = linear((1,), 32, 20, "one").card


@pytest.fixture(scope="module")
def dictionaries() -> list[Dictionary]:
    """Of the tiny model's layers 1 and, together, 0 and 3; nothing reads layer 2."""
    return [linear((1,), 32, 20, "one"), linear((0, 3), 32, 40, "two")]


def test_injected_is_the_plans_shift_and_total_what_became_of_it(
    tiny: HookedModel, dictionaries: list[Dictionary]
) -> None:
    plan, prompt = strong_plan(tiny), prompts_of(tiny)[0]
    text = Text(prompt, WRITTEN, plan)
    (injected,) = attribute(tiny, dictionaries, [text])
    shift = plan.steps[0].shift
    assert torch.allclose(injected.effects[0].delta, shift[[1]], atol=1e-5)
    assert torch.allclose(injected.effects[1].delta, shift[[0, 3]], atol=1e-5)
    (total,) = attribute(tiny, dictionaries, [text], kind="total")
    plain, steered = record_streams(tiny, [Text(prompt, WRITTEN), text])
    own = list(text.writing)
    expected = (steered.leaving - plain.leaving)[:, own].mean(dim=1)
    assert torch.allclose(total.effects[1].delta, expected[[0, 3]], atol=1e-4)
    assert not torch.allclose(expected[3], shift[3], atol=0.1)
    assert injected.not_covered == total.not_covered == (2,)


def test_of_a_gated_plan_what_the_gate_lets_through_is_injected(
    tiny: HookedModel, dictionaries: list[Dictionary]
) -> None:
    (step,) = strong_plan(tiny).steps
    gate = gate_of(tiny, "resid_post")
    text = Text(prompts_of(tiny)[0], WRITTEN, Plan((replace(step, gate=gate),)))
    (found,) = attribute(tiny, dictionaries, [text])
    (streams,) = record_streams(tiny, [text])
    entering = streams.entering[:, list(text.writing)]
    weights = torch.sigmoid(torch.einsum("lpd,ld->lp", entering, gate.theta) + gate.bias[:, None])
    expected = weights.mean(dim=1, keepdim=True) * step.shift
    assert float(weights.std(dim=1)[0]) > 0.05
    assert not found.effects[0].delta.any()  # the gate is closed there
    assert torch.allclose(found.effects[1].delta, expected[[0, 3]], atol=1e-5)


def test_tokens_read_are_all_but_special_ones_and_those_that_count_write(
    tiny: HookedModel, dictionaries: list[Dictionary]
) -> None:
    prompt = prompts_of(tiny)[0]
    (found,) = attribute(tiny, dictionaries, [Text(prompt, WRITTEN, strong_plan(tiny))])
    n = len(prompt.tokens)
    assert len(found.str_tokens) == n - 1 + len(WRITTEN)
    assert found.counted == (*[False] * (n - 2), *[True] * len(WRITTEN), False)
    assert "".join(found.str_tokens[: n - 1]) == prompt.text
    (bare,) = attribute(tiny, dictionaries, [Text(prompt, (), strong_plan(tiny))])
    assert all(bare.counted)


def test_the_top_is_over_all_dictionaries_with_labels_and_json_holds_what_is_left(
    tiny: HookedModel, dictionaries: list[Dictionary]
) -> None:
    (found,) = attribute(
        tiny, dictionaries, [Text(prompts_of(tiny)[0], WRITTEN, strong_plan(tiny))]
    )
    top = found.top(5, {"one": dict.fromkeys(range(20), "a label")})
    sizes = [abs(each.effect) for each in found.top()]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 60
    assert all(each.label == ("a label" if each.dictionary == "one" else "") for each in top)
    content = found.to_dict(2)
    assert [each["effect"] for each in content["features"]] == [t.effect for t in top[:2]]
    assert [each["layers"] for each in content["dictionaries"]] == [[1], [0, 3]]
    assert content["not_covered"] == [2]
    assert all(("per_layer" in each) == (each["layer"] is None) for each in content["features"])
    card = replace(ONE_CARD, neuronpedia_id="tiny/1-res")
    named = replace(found, effects=(replace(found.effects[0], card=card),))
    first = named.to_dict(1)["features"][0]
    assert first["url"] == f"https://www.neuronpedia.org/tiny/1-res/{first['feature']}"
    squares = [each.error.square().sum() / 1 for each in found.effects]
    whole = sum(each.delta.square().sum() for each in found.effects)
    assert content["relative_error"] == pytest.approx(float((sum(squares) / whole).sqrt()))
    assert content["cosine"] == pytest.approx((1 - content["relative_error"] ** 2) ** 0.5, abs=1e-4)


def test_an_attribution_does_not_depend_on_its_neighbours(
    tiny: HookedModel, dictionaries: list[Dictionary]
) -> None:
    texts = [Text(prompt, WRITTEN, strong_plan(tiny)) for prompt in prompts_of(tiny)]
    together = attribute(tiny, dictionaries, texts)
    for text, found in zip(texts, together, strict=True):
        (alone,) = attribute(tiny, dictionaries, [text])
        assert torch.equal(alone.effects[1].weights, found.effects[1].weights)


def test_two_dictionaries_of_one_layer_and_an_unknown_kind_are_refused(
    tiny: HookedModel, dictionaries: list[Dictionary]
) -> None:
    text = Text(prompts_of(tiny)[0], WRITTEN, strong_plan(tiny))
    with pytest.raises(DictionaryError, match=r"read by one dictionary at most, but got \[0, 1, 1"):
        attribute(tiny, [*dictionaries, linear((1,), 32)], [text])
    with pytest.raises(DictionaryError, match="must have different names, but got one, one; ren"):
        attribute(tiny, [dictionaries[0], linear((2,), 32, 20, "one")], [text])
    with pytest.raises(ConfigError, match="kind must be one of injected, total, but got 'both'"):
        attribute(tiny, dictionaries, [text], kind="both")
    with pytest.raises(DictionaryError, match="of width 12"):
        attribute(tiny, [made()], [text])


def test_an_attribution_shows_itself_small_and_escaped(
    tiny: HookedModel, dictionaries: list[Dictionary]
) -> None:
    named = [linear((1,), 32, 20, "<b>one</b>"), dictionaries[1]]
    (found,) = attribute(tiny, named, [Text(prompts_of(tiny)[0], WRITTEN, strong_plan(tiny))])
    shown = found._repr_html_()
    assert shown.count("<tr>") == 11
    assert "<b>" not in shown
    assert f"relative error {found.relative_error:.2f}" in shown
    assert "not covered: layers 2" in shown
