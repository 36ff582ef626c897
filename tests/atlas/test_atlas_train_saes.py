import json

import pytest
import torch
from safetensors.torch import load_file

from fusion_lens.atlas.dictionary_quality import reconstruction
from fusion_lens.atlas.train_saes import SaeConfig, sae_metadata, save_sae, train_sae
from fusion_lens.errors import ConfigError
from fusion_lens.identity import identify
from fusion_lens.sae_files import load_sae_folder

# sae-lens and what it imports raise DeprecationWarnings of their own (6.54, November 2026)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SMALL = SaeConfig(d_sae=32, k=4.0, n_samples=100_000, batch_size=256, dead_after=50)


def sparse_data(n=4000, d_model=12, n_directions=24, seed=0):
    """Residuals that are sums of a few of some directions."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_directions, d_model, generator=generator)
    on = torch.rand(n, n_directions, generator=generator) < 0.1
    return on * torch.rand(n, n_directions, generator=generator) @ directions + 3.0


@pytest.fixture(scope="module")
def saved(tmp_path_factory, atlas):
    pytest.importorskip("sae_lens")
    folder = tmp_path_factory.mktemp("saes") / "sae_layer_2"
    save_sae(train_sae(SMALL, sparse_data(), sae_metadata(atlas, 2)), folder, identify(atlas))
    return folder


def test_training_is_deterministic_leaves_the_generator_and_reconstructs(saved, atlas):
    state = torch.random.get_rng_state()
    again = train_sae(SMALL, sparse_data(), sae_metadata(atlas, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    kept = load_file(saved / "sae_weights.safetensors")["b_dec"]
    assert torch.equal(again.b_dec.detach(), kept)
    resid = sparse_data(seed=0).expand(6, -1, -1)
    [explained], l0, _ = reconstruction(load_sae_folder(saved), resid)
    assert explained > 0.6
    assert l0 < 5


def test_sae_lens_opens_the_folder_and_gives_the_same_codes(saved):
    from sae_lens import SAE

    sae, own, resid = SAE.load_from_disk(saved), load_sae_folder(saved), sparse_data(seed=1)
    with torch.no_grad():
        codes = sae.encode(resid)
        decoded = sae.decode(codes)
    torch.testing.assert_close(own.encode(resid[:, None]).codes, codes)
    torch.testing.assert_close(own.reconstruct(resid[:, None])[:, 0], decoded)


def test_the_folder_holds_halved_matrices_and_says_what_it_is_for(saved, atlas):
    tensors = load_file(saved / "sae_weights.safetensors")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    half, whole = torch.float16, torch.float32
    assert dtypes == {
        "W_enc": half, "W_dec": half, "b_enc": whole, "b_dec": whole, "threshold": whole
    }  # fmt: skip
    config = json.loads((saved / "cfg.json").read_text(encoding="utf-8"))
    assert (config["architecture"], config["d_sae"]) == ("jumprelu", 32)
    metadata = config["metadata"]
    assert metadata["hook_name"] == "blocks.2.hook_resid_post"
    assert metadata["model_name"] == "atlas"
    assert metadata["prepend_bos"] is metadata["exclude_special_tokens"] is True
    assert len(metadata["sha256"]) == 64
    card, identity = load_sae_folder(saved).card, identify(atlas)
    assert (card.layers, card.prepend_bos, card.trained_on_bos) == ((2,), True, False)
    assert (card.weights, card.embedding) == (identity.weights, identity.embedding)


def test_more_codes_than_features_are_refused():
    with pytest.raises(ConfigError, match=r"0 < k <= d_sae must hold, but got .*k=9.0, .*=8"):
        SaeConfig(d_sae=8, k=9.0)
