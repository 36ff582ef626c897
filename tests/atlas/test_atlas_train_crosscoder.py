import pytest
import torch
from safetensors.torch import load_file

from fusion_lens.atlas.crosscoder_weights import STORED, code_norms, init_weights, to_crosscoder
from fusion_lens.atlas.dictionary_quality import reconstruction
from fusion_lens.atlas.train_crosscoder import (
    CrosscoderConfig,
    crosscoder_card,
    fit_normaliser,
    train_crosscoder,
    with_threshold,
)
from fusion_lens.crosscoder_files import load_crosscoder, save_crosscoder
from fusion_lens.dictionaries import Card
from fusion_lens.errors import ConfigError
from fusion_lens.identity import identify
from fusion_lens.models import resid_post

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
    return train_crosscoder(SMALL, resid, normaliser), normaliser


@pytest.fixture(scope="module")
def crosscoder(trained):
    layers = tuple(range(N_LAYERS))
    card = Card("toy", layers, tuple(map(resid_post, layers)), d_model=12, d_sae=48)
    return with_threshold(to_crosscoder(*trained, card), sparse_data(), SMALL.k)


def test_training_is_deterministic(trained):
    again = train_crosscoder(SMALL, sparse_data(), trained[1])
    assert all(torch.equal(*pair) for pair in zip(again.trained, trained[0].trained, strict=True))


def test_what_was_trained_is_what_the_crosscoder_computes(trained, crosscoder):
    weights, normaliser = trained
    x = sparse_data(50).transpose(0, 1)
    inputs = normaliser.normalise(x).flatten(1)
    active = (inputs @ weights.encoder + weights.encoder_bias).relu()
    norms = code_norms(weights.decoder, N_LAYERS)
    codes = active * (active * norms > crosscoder.threshold)
    # the weights are rounded to float16
    torch.testing.assert_close(crosscoder.code_norms, norms, atol=1e-3, rtol=1e-3)
    relative = (crosscoder.encode(x).codes - codes).norm() / codes.norm()
    assert relative < 0.01
    decoded = normaliser.normalise(crosscoder.reconstruct(x)).flatten(1)
    expected = crosscoder.encode(x).codes @ weights.decoder + weights.decoder_bias
    torch.testing.assert_close(decoded, expected, atol=5e-3, rtol=1e-2)


def test_the_saved_file_reconstructs_every_layer_with_k_codes_a_token(crosscoder, tmp_path):
    save_crosscoder(crosscoder, tmp_path, dtype=STORED)
    loaded = load_crosscoder(tmp_path)
    for name in ("encoder_weight", "decoder_weight", "encoder_bias", "decoder_bias"):
        assert torch.equal(getattr(loaded, name), getattr(crosscoder, name))
    assert (loaded.threshold, loaded.k) == (crosscoder.threshold, SMALL.k)
    assert load_file(tmp_path / "model.safetensors")["decoder.weight"].dtype == torch.float16
    explained, l0, _ = reconstruction(loaded, sparse_data())
    assert min(explained) > 0.8
    assert l0 == pytest.approx(SMALL.k, abs=0.01)


def test_the_card_names_the_hooks_and_the_model(atlas):
    card, identity = crosscoder_card(atlas, 832), identify(atlas)
    assert (card.layers, card.d_model, card.d_sae) == (tuple(range(6)), 192, 832)
    assert card.hook_names == tuple(f"blocks.{layer}.hook_resid_post" for layer in range(6))
    assert (card.weights, card.embedding) == (identity.weights, identity.embedding)


def test_every_layer_has_the_same_variance_when_normalised():
    resid = sparse_data()
    x = fit_normaliser(resid).normalise(resid.transpose(0, 1))
    torch.testing.assert_close(x.var(dim=0).sum(dim=-1), torch.full((3,), 12.0))
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(3, 12), atol=1e-5, rtol=0)


def test_initial_directions_have_norm_a_tenth_in_each_layer():
    weights = init_weights(3, 12, 5, seed=0)
    torch.testing.assert_close(code_norms(weights.decoder.detach(), 3), torch.full((5,), 0.3))
    assert torch.equal(weights.encoder, weights.decoder.T)


def test_a_batch_larger_than_all_samples_is_refused():
    with pytest.raises(ConfigError, match="0 < batch_size <= n_samples must hold"):
        CrosscoderConfig(n_samples=8, batch_size=9)
