from __future__ import annotations

import pytest
import torch
from conftest import prompts_of, strong_plan

from fusion_lens.errors import SpanError
from fusion_lens.hooks import fwd_hooks
from fusion_lens.logit_lens import logit_lens
from fusion_lens.models import HookedModel, load_model, resid_post, token_texts
from fusion_lens.teacher_forcing import Text, token_log_probs

WRITTEN = (40, 41, 42, 43, 44)


def by_hand(model: HookedModel, text: Text) -> torch.Tensor:
    """Log-probabilities of every token after every block, by the model's own last modules."""
    hooks = [] if text.plan is None else fwd_hooks(text.plan, prompt=text.prompt)
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        _, cache = model.run_with_cache(torch.tensor([text.tokens]))
        rows = [
            model.unembed(model.ln_final(cache[resid_post(layer)]))[0]
            for layer in range(model.cfg.n_layers)
        ]
    return torch.stack(rows)[:, list(text.writing)].log_softmax(dim=-1)


@pytest.mark.parametrize("executor", ["lean", "hooks"])
def test_every_layer_is_read_by_the_models_own_norm_and_unembedding(
    tiny: HookedModel, executor: str
) -> None:
    prompts = prompts_of(tiny)
    texts = [
        Text(prompts[0], WRITTEN),
        Text(prompts[1], WRITTEN[:2], strong_plan(tiny)),
        Text(prompts[2], WRITTEN, strong_plan(tiny, 0.5, positions="completion")),
    ]
    for text, lens in zip(texts, logit_lens(tiny, texts, executor=executor), strict=True):
        expected = by_hand(tiny, text)
        n = len(text.written)
        assert lens.log_probs.shape == (4, n)
        own = expected[:, range(n), list(text.written)]
        assert torch.allclose(lens.log_probs, own, atol=2e-4)
        above = (expected > own[..., None] + 1e-3).sum(dim=-1) + 1
        close = (expected > own[..., None] - 1e-3).sum(dim=-1)
        assert bool(((lens.ranks >= above) & (lens.ranks <= close)).all())
        assert lens.str_tokens == token_texts(tiny, text.tokens)[-n:]


def test_the_last_block_is_the_model_itself_soft_cap_included(gemma_folder) -> None:
    model = load_model(gemma_folder)
    assert model.cfg.output_logits_soft_cap > 0
    text = Text(prompts_of(model)[0], WRITTEN, strong_plan(model))
    (lens,) = logit_lens(model, [text])
    (own,) = token_log_probs(model, [text])
    assert lens.log_probs[-1].tolist() == pytest.approx(own, abs=1e-4)


def test_a_likeliest_token_has_rank_one(tiny: HookedModel) -> None:
    prompt = prompts_of(tiny)[0]
    with torch.no_grad():
        greedy = int(tiny(torch.tensor([prompt.tokens]))[0, -1].argmax())
    (lens,) = logit_lens(tiny, [Text(prompt, (greedy,))])
    assert int(lens.ranks[-1, 0]) == 1


def test_a_text_without_anything_written_is_refused(tiny: HookedModel) -> None:
    with pytest.raises(SpanError, match="there must be tokens after the prompt"):
        logit_lens(tiny, [Text(prompts_of(tiny)[0])])
