from dataclasses import replace

import pytest
import torch
from dictionaries_by_hand import identity_sae

from fusion_lens.atlas.corpus import Document
from fusion_lens.atlas.dictionary_activations import record_tokens, tokenize_documents
from fusion_lens.atlas.dictionary_losses import spliced_losses

DOCUMENTS = [
    Document("Question: When was Alia Shelmore born?", "\nAnswer and explanation:\n3 May 1871"),
    Document("", "The lake is quiet in the autumn."),
]


@pytest.fixture(scope="module")
def rows(atlas):
    return tokenize_documents(atlas, DOCUMENTS)


def test_a_perfect_dictionary_costs_nothing_and_an_empty_one_is_the_ablation(
    atlas, rows, untouched
):
    untouched(atlas)
    means = record_tokens(atlas, rows).resid.mean(dim=1)
    perfect = identity_sae(192, layer=3)
    empty = replace(perfect, threshold=torch.full((384,), 1e9), b_dec=means[3])
    losses = spliced_losses({"perfect": perfect, "empty": empty}, atlas, rows, means)
    assert losses.n_tokens == sum(len(row) - 2 for row in rows)
    assert losses.spliced["perfect", 3] == pytest.approx(losses.clean, abs=1e-3)
    assert losses.spliced["empty", 3] == pytest.approx(losses.ablated[3], abs=1e-3)
    assert losses.ablated[3] > losses.clean + 1


def test_the_clean_loss_is_the_models_own_behind_every_token_but_bos(atlas, rows):
    losses = spliced_losses({}, atlas, rows, torch.zeros(6, 192))
    total = 0.0
    for row in rows:
        with torch.no_grad():
            log_probs = atlas(torch.tensor([row]), return_type="logits")[0].log_softmax(dim=-1)
        total -= sum(float(log_probs[place, row[place + 1]]) for place in range(1, len(row) - 1))
    assert losses.clean == pytest.approx(total / losses.n_tokens, rel=1e-4)
