import json

import pytest
import torch
from safetensors.torch import load_file

from fusion_lens.atlas.crosscoder_layout import Trained, code_norms, halved, save_layout
from fusion_lens.atlas.dictionary_cards import save_card
from fusion_lens.atlas.dictionary_codec import open_dictionary
from fusion_lens.atlas.dictionary_quality import reconstruction
from fusion_lens.atlas.train_crosscoder import (
    CrosscoderConfig,
    estimate_threshold,
    fit_normaliser,
    init_weights,
    train_crosscoder,
)
from fusion_lens.errors import ConfigError

SMALL = CrosscoderConfig(d_sae=48, k=4, n_samples=60_000, batch_size=256, dead_after=20, k_aux=4)
N_LAYERS = 3


def sparse_data(n=4000, d_model=12, n_directions=24):
    """Residuals of three layers that are sums of the same few of some directions, ever larger."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(N_LAYERS, n_directions, d_model, generator=generator)
    on = torch.rand(n, n_directions, generator=generator) < 0.1
    codes = on * torch.rand(n, n_directions, generator=generator)
    return torch.stack([(1 + layer) * codes @ directions[layer] + 3 for layer in range(N_LAYERS)])


@pytest.fixture(scope="module")
def trained():
    resid = sparse_data()
    normaliser = fit_normaliser(resid)
    return halved(train_crosscoder(SMALL, resid, normaliser)), normaliser


def test_training_is_deterministic(trained):
    again = halved(train_crosscoder(SMALL, sparse_data(), trained[1]))
    assert all(torch.equal(*pair) for pair in zip(again.trained, trained[0].trained, strict=True))


def test_the_saved_layout_reconstructs_every_layer_with_k_codes_a_token(trained, tmp_path):
    weights, normaliser = trained
    resid = sparse_data()
    x = normaliser(resid.transpose(0, 1)).flatten(1)
    threshold = estimate_threshold(weights, x, SMALL.k, N_LAYERS)
    save_layout(Trained(weights, normaliser, SMALL.k, threshold), tmp_path, {"model_name": "toy"})
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(N_LAYERS)]
    save_card(tmp_path, {"model": {"n_layers": N_LAYERS}, "hook_names": names})
    explained, l0, _ = reconstruction(open_dictionary(tmp_path), resid)
    assert min(explained) > 0.8
    assert l0 == pytest.approx(SMALL.k, abs=0.01)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tuple(tensors["encoder.weight"].shape) == (3, 12, 48)
    assert tuple(tensors["decoder.weight"].shape) == (3, 48, 12)
    assert tensors["decoder.weight"].dtype == torch.float16
    assert int(tensors["code_normalization_id"]) == 1
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["dict_size"], config["k"]) == (48, 4)
    assert config["metadata"] == {"model_name": "toy"}


def test_every_layer_has_the_same_variance_when_normalised():
    resid = sparse_data()
    x = fit_normaliser(resid)(resid.transpose(0, 1))
    torch.testing.assert_close(x.var(dim=0).sum(dim=-1), torch.full((3,), 12.0))
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(3, 12), atol=1e-5, rtol=0)


def test_initial_directions_have_norm_a_tenth_in_each_layer():
    weights = init_weights(3, 12, 5, seed=0)
    torch.testing.assert_close(code_norms(weights.decoder.detach(), 3), torch.full((5,), 0.3))
    assert torch.equal(weights.encoder, weights.decoder.T)


def test_a_batch_larger_than_all_samples_is_refused():
    with pytest.raises(ConfigError, match="0 < batch_size <= n_samples must hold"):
        CrosscoderConfig(n_samples=8, batch_size=9)
