from itertools import islice

import torch

from fusion_lens.atlas.corpus import Document
from fusion_lens.atlas.dictionary_activations import (
    record_tokens,
    shuffled_batches,
    tokenize_documents,
)
from fusion_lens.models import resid_post

DOCUMENTS = [
    Document("Question: When was Alia Shelmore born?", "\n3 May 1871"),
    Document("", "The lake is quiet."),
    Document("Question:", " Who?"),
]


def test_the_residuals_are_those_of_the_hook_points_without_bos_and_eos(atlas, untouched):
    untouched(atlas)
    rows = tokenize_documents(atlas, DOCUMENTS)
    special = (atlas.tokenizer.bos_token_id, atlas.tokenizer.eos_token_id)
    assert {(row[0], row[-1]) for row in rows} == {special}
    recorded = record_tokens(atlas, rows)
    assert recorded.tokens.tolist() == [token for row in rows for token in row[1:-1]]
    assert recorded.position.tolist() == [place for row in rows for place in range(len(row) - 2)]
    for number, row in enumerate(rows):
        _, cache = atlas.run_with_cache(torch.tensor([row]), return_type="logits")
        own = recorded.document == number
        for layer in range(6):
            expected = cache[resid_post(layer)][0, 1:-1]
            torch.testing.assert_close(
                recorded.resid[layer, own], expected, atol=2e-3, rtol=1e-4, check_stride=False
            )


def test_an_epoch_holds_each_token_once_in_an_order_of_the_seed():
    resid = torch.arange(24.0).view(1, 12, 2).repeat(3, 1, 1)
    batches = list(islice(shuffled_batches(resid, 4, seed=0), 6))
    assert {tuple(batch.shape) for batch in batches} == {(4, 3, 2)}
    epochs = [torch.cat([batch[:, 0, 0] for batch in batches[i : i + 3]]) for i in (0, 3)]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == resid[0, :, 0].tolist()
    assert epochs[0].tolist() != epochs[1].tolist()
    again = next(shuffled_batches(resid[0], 4, seed=0))
    assert torch.equal(again, batches[0][:, 0])
    assert not torch.equal(next(shuffled_batches(resid[0], 4, seed=1)), again)
