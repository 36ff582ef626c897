import json

import pytest
import torch

from fusion_lens.atlas import DICTIONARIES
from fusion_lens.atlas.corpus import Document
from fusion_lens.atlas.dictionary_activations import record_tokens, token_chunks, tokenize_documents
from fusion_lens.atlas.dictionary_cards import load_card, open_dictionary, sae_name, save_card
from fusion_lens.crosscoder_files import load_crosscoder
from fusion_lens.errors import DictionaryError, InputFileError
from fusion_lens.identity import identify
from fusion_lens.models import resid_post
from fusion_lens.sae_files import load_sae_folder
from fusion_lens.saes import load_sae

LAYERS = tuple(range(6))
NAMES = ["crosscoder", *(sae_name(layer) for layer in LAYERS)]


@pytest.fixture(scope="module")
def resid(atlas):
    documents = [
        Document("Question: When was Alia Shelmore born?", "\nAnswer and explanation:\n3 May 1871"),
        Document("", "The lake is quiet in the autumn."),
    ]
    return record_tokens(atlas, tokenize_documents(atlas, documents)).resid


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_dictionary_says_where_it_reads_which_model(name, atlas):
    folder, identity = DICTIONARIES / name, identify(atlas)
    card = open_dictionary(folder, atlas).card
    layers = LAYERS if name == "crosscoder" else (int(name[-1]),)
    assert (card.name, card.layers) == (name, layers)
    assert card.hook_names == tuple(resid_post(layer) for layer in layers)
    assert (card.basis, card.model_name) == ("unprocessed", "atlas")
    assert (card.prepend_bos, card.trained_on_bos) == (True, False)
    assert (card.weights, card.embedding) == (identity.weights, identity.embedding)
    written = load_card(folder)
    assert written["hook_names"] == list(card.hook_names)
    assert written["model"]["weights"] == card.weights


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_dictionary_is_refused_on_other_weights(name, other_atlas):
    message = rf"{name} must be used on the checkpoint .* \(atlas, weights 7d7a61ba19ff\)"
    with pytest.raises(DictionaryError, match=message):
        open_dictionary(DICTIONARIES / name, other_atlas)


def test_a_shipped_crosscoder_has_the_matrices_of_its_file_and_a_checksum(tmp_path):
    shipped = DICTIONARIES / "crosscoder" / "model.safetensors"
    content = bytearray(shipped.read_bytes())
    loaded = load_crosscoder(DICTIONARIES / "crosscoder")
    for weight in (loaded.encoder_weight, loaded.decoder_weight):
        assert torch.equal(weight, weight.half().float())
    content[-1] ^= 1
    (tmp_path / shipped.name).write_bytes(content)
    with pytest.raises(InputFileError, match="does not match its checksum"):
        load_crosscoder(tmp_path)


# sae-lens and what it imports raise DeprecationWarnings of their own (6.54, November 2026)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("layer", LAYERS)
def test_a_shipped_saes_codes_are_those_of_sae_lens(layer, resid):
    pytest.importorskip("sae_lens")
    folder = DICTIONARIES / sae_name(layer)
    own, theirs = load_sae_folder(folder), load_sae(folder, reader="sae-lens")
    [x] = token_chunks(resid, [layer])
    codes = own.encode(x).codes
    assert (codes > 0).any()
    torch.testing.assert_close(codes, theirs.encode(x).codes)
    torch.testing.assert_close(own.reconstruct(x), theirs.reconstruct(x))


def test_a_card_of_other_weights_or_none_is_refused(tmp_path):
    with pytest.raises(InputFileError, match="must be a dictionary's card"):
        load_card(tmp_path)
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(b"weights")
    save_card(tmp_path, {"hook_names": []})
    assert load_card(tmp_path)["hook_names"] == []
    weights.write_bytes(b"others")
    with pytest.raises(InputFileError, match="must be the card of the weights beside it"):
        load_card(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps([]), encoding="utf-8")
    with pytest.raises(InputFileError, match="must hold a JSON object, but got list"):
        load_card(tmp_path)


def test_a_card_of_brackets_without_end_is_refused(tmp_path):
    (tmp_path / "card.json").write_text("[" * 100_000)
    with pytest.raises(InputFileError, match="it must be a dictionary's card, but: maximum recurs"):
        load_card(tmp_path)
