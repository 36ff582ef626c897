import pytest

from fusion_lens.atlas.corpus import draw_documents
from fusion_lens.atlas.tokenizer import train_tokenizer
from fusion_lens.atlas.world import make_world

DOCUMENTS = draw_documents(make_world(0), seed=0, step=0, count=300)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((document.text for document in DOCUMENTS), d_vocab=600)


def test_decoding_gives_the_text_back(tokenizer):
    for document in DOCUMENTS:
        tokens = tokenizer(document.text).input_ids
        assert tokenizer.decode(tokens, skip_special_tokens=True) == document.text


def test_the_beginning_is_marked_once_and_the_special_tokens_differ(tokenizer):
    tokens = tokenizer("Question").input_ids
    assert tokens[0] == tokenizer.bos_token_id == 0
    assert tokens.count(0) == 1
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2)


def test_a_prompt_and_its_completion_are_tokenized_like_the_whole_text(tokenizer):
    for document in DOCUMENTS:
        prompt = tokenizer(document.prompt).input_ids
        completion = tokenizer(document.completion, add_special_tokens=False).input_ids
        assert prompt + completion == tokenizer(document.text).input_ids


def test_dates_and_numbers_are_cut_two_digits_at_a_time_wherever_they_stand():
    texts = ["14 March 1872", "3,482", "47,482"] * 100
    tokenizer = train_tokenizer(texts, d_vocab=300)
    for before in ("", " ", "\n", "on "):
        assert tokenizer.tokenize(f"{before}14 March 1872")[-5:] == [
            *("14", "ĠMarch", "Ġ", "18", "72")
        ]
        assert tokenizer.tokenize(f"{before}47,482")[-4:] == ["47", ",", "48", "2"]
