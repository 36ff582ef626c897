from __future__ import annotations

import pytest
from engine import logits_of, slow_logits, written
from hypothesis import given, settings
from hypothesis import strategies as st
from token_kinds import across_words, no_bos, no_padding, one_special, opened_with
from tokenizers import AddedToken

from fusion_lens.decoding import Row
from fusion_lens.errors import ConfigError, SpanError
from fusion_lens.models import load_model
from fusion_lens.prompts import (
    Layout,
    Template,
    baseline_prompt,
    continuation,
    explanation_prompt,
    question_prompt,
    reference_prompt,
    tokenize,
)


def text_of(model, prompt) -> str:
    start, stop = prompt.span
    return model.tokenizer.decode(prompt.tokens[start:stop])


def test_the_texts_are_those_of_the_paper(tiny) -> None:
    assert question_prompt(tiny, "Who?").text == "Question: Who?\nAnswer and explanation:"
    assert explanation_prompt(tiny, "Who?", "Ada").text == (
        "Question: Who?\nAnswer: Ada\nExplanation:"
    )
    assert reference_prompt(tiny, "Who?", "Ada", "She did.").text == (
        "Question: Who?\nAnswer and explanation:\nAda\nShe did."
    )


def test_an_empty_explanation_leaves_gold_alone(tiny) -> None:
    prompt = reference_prompt(tiny, "Who?", "Ada")
    assert prompt.text == "Question: Who?\nAnswer and explanation:\nAda"
    assert text_of(tiny, prompt) == "Ada"


def test_the_span_is_gold_and_explanation_without_question_and_bos(tiny) -> None:
    prompt = reference_prompt(tiny, "Who is Ada?", "Ada Lovelace", "She wrote Ada Lovelace.")
    assert text_of(tiny, prompt) == "Ada Lovelace\nShe wrote Ada Lovelace."
    assert prompt.pooled == tuple(range(*prompt.span))


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=30).filter(str.strip), st.text(max_size=40))
def test_every_span_covers_its_answer(tiny, answer: str, explanation: str) -> None:
    prompt = reference_prompt(tiny, "Who?", answer, explanation)
    covered = text_of(tiny, prompt)
    assert answer.rstrip("\n") in covered
    start, stop = prompt.span
    assert stop == len(prompt.tokens)
    assert start > len(question_prompt(tiny, "Who?").tokens) - 2


def test_braces_in_a_question_are_text(tiny) -> None:
    assert "f(x) = {x}" in question_prompt(tiny, "What is f(x) = {x}?").text


def test_bos_is_prepended_as_transformer_lens_does_shown_and_never_doubled(tiny) -> None:
    prompt = tokenize(tiny, "Who?")
    assert prompt.str_tokens[0] == "<s>"
    assert prompt.special == (0,)
    assert list(prompt.tokens) == tiny.to_tokens("Who?")[0].tolist()
    bare = tokenize(tiny, "Who?", prepend_bos=False)
    assert bare.special == ()
    assert bare.tokens == prompt.tokens[1:]
    assert tokenize(tiny, "<s>Who?").tokens == prompt.tokens


def test_special_tokens_inside_a_text_are_special_wherever_they_are(tiny) -> None:
    prompt = tokenize(tiny, "a</s>b")
    assert prompt.layout == Layout(4, (0, 2))
    assert prompt.pooled == (1, 3)


def test_a_bos_that_is_also_the_unknown_token_is_special(tiny) -> None:
    tiny.tokenizer.unk_token = "<s>"
    try:
        assert tokenize(tiny, "Who?").special == (0,)
    finally:
        tiny.tokenizer.unk_token = None


def test_a_token_marked_special_without_a_name_is_special(tiny_folder) -> None:
    model = load_model(tiny_folder)
    model.tokenizer.add_tokens([AddedToken("<|header|>", special=True)])
    known = model.tokenizer.convert_tokens_to_ids("<|header|>")
    prompt = tokenize(model, "a<|header|>b")
    assert prompt.tokens[2] == known
    assert prompt.special == (0, 2)


def test_an_answer_of_special_tokens_is_no_answer(tiny) -> None:
    with pytest.raises(SpanError, match="'</s>' has no known token of its own"):
        reference_prompt(tiny, "Who?", "</s>", "Because.")


def test_an_answer_that_also_stands_in_the_template_is_found_in_its_place(tiny) -> None:
    template = Template(reference="\nThe answer is {answer}.\n{explanation}")
    prompt = reference_prompt(tiny, "Who?", "e", "Yes.", template)
    assert prompt.text.endswith("\nThe answer is e.\nYes.")
    assert text_of(tiny, prompt).strip() == "e.\nYes."


def test_a_prompt_becomes_a_batch_of_one(tiny) -> None:
    prompt = tokenize(tiny, "Who?")
    assert prompt.to_tensor().tolist() == [list(prompt.tokens)]


def test_a_span_without_tokens_is_an_error(tiny) -> None:
    with pytest.raises(
        SpanError, match="must be found in the reference's tokens, but '  ' is white"
    ):
        reference_prompt(tiny, "Who?", "  ")
    with pytest.raises(SpanError, match="has no known token of its own"):
        tokenize(tiny, "Ada", chars=(3, 3))


def test_an_answer_the_tokenizer_cannot_write_is_an_error(stories_folder) -> None:
    from transformers import AutoTokenizer

    model = load_model(stories_folder)
    model.tokenizer = AutoTokenizer.from_pretrained(stories_folder)
    prompt = reference_prompt(model, "Who?", "b")
    assert prompt.span == (len(prompt.tokens) - 1, len(prompt.tokens))
    model.tokenizer.unk_token = prompt.str_tokens[-1]
    with pytest.raises(SpanError, match="'b' has no known token of its own; give an answer"):
        reference_prompt(model, "Who?", "b")


def test_a_template_without_its_field_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the question template must contain {question}"):
        Template(question="Q:")
    with pytest.raises(ConfigError, match=r"the baseline template must contain {question}"):
        Template(baseline="Who?")
    with pytest.raises(ConfigError, match=r"the reference template must contain {explanation}"):
        Template(reference="{answer}")


def test_a_chat_template_wraps_the_bare_question_on_request(tiny) -> None:
    template = Template(chat=True)
    with pytest.raises(ConfigError, match="chat=True needs a tokenizer with a chat template"):
        question_prompt(tiny, "Who?", template)
    tiny.tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}model: {% endif %}"
    )
    try:
        prompt = question_prompt(tiny, "Who?", template)
        assert prompt.text == "<s>user: Who?</s>model: "
        assert prompt.str_tokens.count("<s>") == 1
        reference = reference_prompt(tiny, "Who?", "Ada", "Yes.", template)
        assert reference.text == "<s>user: Who?</s>model: Ada\nYes."
        assert text_of(tiny, reference) == "Ada\nYes."
    finally:
        tiny.tokenizer.chat_template = None


def test_the_strict_span_is_the_authors(tiny) -> None:
    strict = Template(strict_span=True)
    # gold and explanation have 3 + 8 characters; the line break between them costs the last one
    prompt = reference_prompt(tiny, "Who?", "Ada", "She did.", strict)
    assert (
        text_of(tiny, prompt)
        == text_of(tiny, reference_prompt(tiny, "Who?", "Ada", "She did."))[:-1]
    )
    # gold stands in the question first: the span begins there
    prompt = reference_prompt(tiny, "Is Ada it?", "Ada", "", strict)
    assert text_of(tiny, prompt).strip() == "Ada"
    assert prompt.span[0] < len(question_prompt(tiny, "Is Ada it?").tokens) - 5


def test_the_baseline_may_be_asked_otherwise(tiny) -> None:
    assert baseline_prompt(tiny, "Who?") == question_prompt(tiny, "Who?")
    assert baseline_prompt(tiny, "Who?", Template(baseline="{question}")) == tokenize(tiny, "Who?")


@pytest.mark.parametrize(
    ("family", "tokenizer", "first", "special", "pad"),
    [
        ("gpt2", one_special, "<|endoftext|>", (0,), "<|endoftext|>"),
        ("gpt_neox", one_special, "Question", (), "<|endoftext|>"),
        ("qwen3", no_bos, "Question", (), "<|endoftext|>"),
        ("llama", no_padding, "<s>", (0,), "</s>"),
    ],
)
def test_bos_and_padding_are_what_the_family_has(
    tmp_path, family, tokenizer, first, special, pad
) -> None:
    model = opened_with(family, tokenizer, tmp_path)
    asked = question_prompt(model, "Who wrote the red book?")
    assert (asked.str_tokens[0], asked.special) == (first, special)
    assert list(asked.tokens) == model.to_tokens(asked.text)[0].tolist()
    # TransformerLens gives a tokenizer the padding it lacks
    assert model.tokenizer.pad_token == pad
    reference = reference_prompt(model, "Who wrote the red book?", "Ada Lovelace")
    assert text_of(model, reference).endswith("Ada Lovelace")
    assert set(reference.special) == set(special)
    rows = [Row(prompt) for prompt in (asked, reference)]
    together = written(model, rows, slots=2)
    for row, completion in zip(rows, together, strict=True):
        assert (logits_of(completion) - slow_logits(model, row, completion)).abs().max() < 1e-4


def test_a_bos_that_a_tokenizer_lacks_is_the_end_of_a_text_only_on_request(tmp_path) -> None:
    model = opened_with("qwen3", no_bos, tmp_path)
    assert tokenize(model, "Who?").special == ()
    asked = tokenize(model, "Who?", prepend_bos=True)
    assert (asked.str_tokens[0], asked.special) == ("<|im_end|>", (0,))


def test_a_token_that_holds_the_prompts_end_and_the_answers_beginning_is_of_the_answer(
    tmp_path,
) -> None:
    model = opened_with("gemma2", across_words, tmp_path)
    asked = question_prompt(model, "Who?")
    reference = reference_prompt(model, "Who?", "Ada", "In 1843.")
    # the reference does not begin with the prompt's tokens: the last of them is another
    assert (len(asked.tokens), asked.str_tokens[-2:]) == (39, ("n", ":"))
    assert reference.str_tokens[37:40] == ("n", ":\u010aAda", "\u010a")
    assert reference.span == (38, len(reference.tokens))
    assert text_of(model, reference) == ":\nAda\nIn 1843."
    assert reference.pooled == tuple(range(38, len(reference.tokens)))
    # what stands before the answer in a token of its own is no part of it
    template = Template(reference="\nAda {answer}{explanation}")
    behind = reference_prompt(model, "Who?", "Lovelace", template=template)
    assert behind.str_tokens[slice(*behind.span)] == ("\u0120Lovelace",)


def test_what_follows_a_prompt_is_told_alone_where_the_texts_tokens_differ(tmp_path) -> None:
    model = opened_with("gemma2", across_words, tmp_path)
    asked = question_prompt(model, "Who?")
    tail = continuation(model, asked, "\nAda")
    assert model.tokenizer.decode(tail) == "\nAda"
    assert tail == tokenize(model, "\nAda", prepend_bos=False).tokens
    spelt = tokenize(model, asked.text + "\nAda").tokens
    assert asked.tokens + tail != spelt
