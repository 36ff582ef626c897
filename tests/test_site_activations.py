from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from conftest import deltas_of
from torch import Tensor

from fusion_lens.errors import ActivationError, ConfigError, SpanError
from fusion_lens.hooks import fwd_hooks
from fusion_lens.models import load_model, site_hook
from fusion_lens.plans import make_plan
from fusion_lens.prompts import tokenize
from fusion_lens.site_activations import SiteActivations, record_at
from fusion_lens.teacher_forcing import Text

SITES = ("resid_post", "attn_z", "mlp_out")


def texts_of(model: Any) -> list[Text]:
    long = tokenize(model, "Question: Who wrote the red book of the harbour?\nAnswer:")
    return [
        Text(tokenize(model, "The harbour is quiet in winter.")),
        Text(long, tokenize(model, " Ada Lovelace", prepend_bos=False).tokens),
        Text(tokenize(model, "Who?"), tokenize(model, " Tom was born.", prepend_bos=False).tokens),
    ]


def cached(model: Any, text: Text, site: str) -> Tensor:
    """The site of every layer in a run of its own, "layer pos width", by TransformerLens' cache."""
    names = [site_hook(model, site, layer) for layer in range(int(model.cfg.n_layers))]
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any, *, name: str) -> None:
        seen[name] = x[0].flatten(start_dim=1).detach()

    hooks: list[Any] = [(name, partial(keep, name=name)) for name in names]
    if text.plan is not None:
        hooks += fwd_hooks(text.plan, model=model, prompt=text.prompt, offset=0)
    model.run_with_hooks(torch.tensor([text.tokens]), fwd_hooks=hooks)
    return torch.stack([seen[name] for name in names])


@pytest.mark.parametrize("executor", ["lean", "hooks"])
@pytest.mark.parametrize("site", SITES)
def test_what_is_read_is_what_a_run_alone_holds(tiny, site: str, executor: str) -> None:
    texts = texts_of(tiny)
    for tokens in ("last", "mean", "written"):
        own = texts if tokens != "written" else texts[1:]
        found = record_at(tiny, own, site, tokens=tokens, executor=executor)
        assert (found.site, len(found)) == (site, len(own))
        for text, row in zip(own, found.values, strict=True):
            start = len(text.prompt.tokens) if tokens == "written" else 1
            alone = cached(tiny, text, site)
            expected = alone[:, -1] if tokens == "last" else alone[:, start:].mean(dim=1)
            torch.testing.assert_close(row, expected, atol=2e-5, rtol=1e-5)


def test_a_steered_text_is_read_as_it_enters_the_steering_of_its_own_layer(tiny) -> None:
    plan = make_plan(deltas_of(tiny), 3.0)
    text = texts_of(tiny)[1]
    steered = record_at(tiny, [Text(text.prompt, text.written, plan)]).values[0]
    plain = record_at(tiny, [text]).values[0]
    assert torch.equal(steered[0], plain[0])
    expected = cached(tiny, Text(text.prompt, text.written, plan), "resid_post")
    torch.testing.assert_close(steered, expected[:, -1], atol=2e-5, rtol=1e-5)
    assert float((steered[1:] - plain[1:]).norm()) > 1.0


def test_a_text_does_not_depend_on_those_beside_it(tiny) -> None:
    texts = texts_of(tiny)
    together = record_at(tiny, texts * 7, tokens="mean").values
    for n, text in enumerate(texts):
        assert torch.equal(together[n], record_at(tiny, [text], tokens="mean").values[0])
        assert torch.equal(together[n], together[n + 18])


def test_texts_without_a_token_to_read_are_refused(tiny) -> None:
    with pytest.raises(SpanError, match="a token behind its prompt, but 'The harbour"):
        record_at(tiny, texts_of(tiny), tokens="written")
    with pytest.raises(SpanError, match="a token that is not special"):
        record_at(tiny, [Text(tokenize(tiny, ""))], tokens="mean")
    with pytest.raises(ActivationError, match="at least one text"):
        record_at(tiny, [])
    with pytest.raises(ConfigError, match="site must be"):
        record_at(tiny, texts_of(tiny), "mlp")
    with pytest.raises(ConfigError, match="tokens must be"):
        record_at(tiny, texts_of(tiny), tokens="first")


def test_activations_of_another_site_shape_or_model_are_refused(tiny, other_folder) -> None:
    other = load_model(other_folder)
    texts = texts_of(tiny)
    found = record_at(tiny, texts)
    with pytest.raises(ActivationError, match="must be of one site"):
        found.check_beside(record_at(tiny, texts, "attn_z"))
    with pytest.raises(ActivationError, match="must come from one model"):
        found.check_beside(record_at(other, texts))
    with pytest.raises(ActivationError, match=r"shape \(text, 4, 32\)"):
        SiteActivations(found.values[:, :3], "resid_post", found.model)
    with pytest.raises(ActivationError, match="finite"):
        SiteActivations(found.values / 0, "resid_post", found.model)
