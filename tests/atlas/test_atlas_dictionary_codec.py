import json

import pytest
import torch
from codecs_by_hand import identity_codec
from safetensors.torch import save_file

from fusion_lens.atlas.dictionary_cards import save_card
from fusion_lens.atlas.dictionary_codec import Codec, open_dictionary
from fusion_lens.errors import InputFileError


def test_an_identity_gives_everything_back():
    resid = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    codec = identity_codec(4)
    codes = codec.encode(resid)
    assert (codes > 0).sum(dim=1).tolist() == [4] * 5
    torch.testing.assert_close(codec.decode(codes), resid)


def test_a_crosscoder_sums_over_layers_and_compares_gated_codes_with_the_threshold():
    codec = Codec(
        layers=(0, 1),
        encoder=torch.tensor([[[1.0, 0.0]], [[2.0, 1.0]]]),
        encoder_bias=torch.tensor([0.5, 0.0]),
        decoder=torch.tensor([[[1.0], [3.0]], [[0.0], [1.0]]]),
        decoder_bias=torch.tensor([[1.0], [0.0]]),
        threshold=torch.tensor([3.0, 3.0]),
        gate=torch.tensor([1.0, 4.0]),
        mean=torch.tensor([[1.0], [0.0]]),
        scale=torch.tensor([2.0, 1.0]),
    )
    resid = torch.tensor([[[2.0], [1.0]], [[0.5], [0.0]]])
    # token 0: 2 * (2 - 1) * 1 + 0.5 * 2 + 0.5 = 3.5 and 0.5 * 4 = 2; token 1: 0.5 and 0
    codes = codec.encode(resid)
    assert codes.tolist() == [[3.5, 0.0], [0.0, 0.0]]
    assert codec.decode(codes)[..., 0].tolist() == [[3.25, 1.5], [0.0, 0.0]]


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            "W_enc": torch.randn(3, 5, generator=generator).half(),
            "b_enc": torch.zeros(5),
            "W_dec": torch.randn(5, 3, generator=generator).half(),
            "b_dec": torch.ones(3),
            "threshold": torch.full((5,), 0.1),
        },
        tmp_path / "sae_weights.safetensors",
    )
    config = {"architecture": "jumprelu", "apply_b_dec_to_input": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config), encoding="utf-8")
    save_card(tmp_path, {"model": {"n_layers": 6}, "hook_names": ["blocks.4.hook_resid_post"]})
    return tmp_path


def test_an_sae_is_the_case_of_one_layer(folder):
    codec = open_dictionary(folder)
    assert codec.layers == (4,)
    resid = torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(1))
    pre = (resid[0] - 1) @ codec.encoder[0]
    codes = pre.relu() * (pre > 0.1)
    torch.testing.assert_close(codec.encode(resid), codes)
    torch.testing.assert_close(codec.decode(codes)[0], codes @ codec.decoder[0] + 1)


def test_weights_that_are_not_the_cards_are_refused(folder):
    path = folder / "sae_weights.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(InputFileError, match="must be the weights of the card beside it"):
        open_dictionary(folder)


def test_a_folder_without_a_card_is_refused(tmp_path):
    with pytest.raises(InputFileError, match="must be a dictionary's card"):
        open_dictionary(tmp_path)
