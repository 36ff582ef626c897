"""Contrasts -> texts as a model reads them: prompt and continuation, in tokens."""

from __future__ import annotations

from collections.abc import Sequence

from fusion_lens.contrasts import Example, Pair
from fusion_lens.models import HookedModel
from fusion_lens.prompts import continuation, tokenize
from fusion_lens.teacher_forcing import Text


def example_texts(model: HookedModel, examples: Sequence[Example]) -> list[Text]:
    """Every example behind its prompt; one without a prompt is read as a prompt that nothing
    follows."""
    return [_text(model, example.prompt, example.text) for example in examples]


def pair_texts(model: HookedModel, pairs: Sequence[Pair]) -> tuple[list[Text], list[Text]]:
    """The right and the wrong text of every pair."""
    right = [_text(model, pair.prompt, pair.right) for pair in pairs]
    return right, [_text(model, pair.prompt, pair.wrong) for pair in pairs]


def _text(model: HookedModel, prompt: str, text: str) -> Text:
    if not prompt:
        return Text(tokenize(model, text))
    read = tokenize(model, prompt)
    return Text(read, continuation(model, read, text))
