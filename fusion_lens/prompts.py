"""A question -> text and tokens, and which tokens are the answer.

Texts are those of Fusion Steering (arXiv 2505.22572), as docs/method.md restates them. Special
tokens are found by id and shown (`Prompt.special`), never guessed from a position.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from fusion_lens.errors import ConfigError, ModelError, SpanError
from fusion_lens.messages import Message, chat_text
from fusion_lens.models import HookedModel


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in a prompt: its length in tokens, and the positions of special tokens."""

    length: int
    special: tuple[int, ...]


NO_PROMPT = Layout(0, ())
"""Of plans that were made for no prompt of their own, but fitted on many texts."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text as the model reads it.

    `span` is the half-open token range that is pooled over (None: the whole prompt), `str_tokens`
    the text of every token, BOS included if there is one.
    """

    text: str
    tokens: tuple[int, ...]
    str_tokens: tuple[str, ...]
    special: tuple[int, ...]
    span: tuple[int, int] | None = None

    def to_tensor(self) -> Int[Tensor, "1 pos"]:
        """The tokens as a batch of one, for the model's own methods.

        Their `to_tokens(prompt.text)` would add a second BOS to a text that has one.
        """
        return torch.tensor([self.tokens])

    @property
    def layout(self) -> Layout:
        """Length and special positions."""
        return Layout(len(self.tokens), self.special)

    @property
    def pooled(self) -> tuple[int, ...]:
        """The positions a mean is taken over: the span (or everything) without special tokens."""
        start, stop = self.span or (0, len(self.tokens))
        return tuple(t for t in range(start, stop) if t not in self.special)


@dataclass(frozen=True, slots=True)
class Template:
    """The texts around a question.

    `prepend_bos=None` does what TransformerLens does for the model (`cfg.default_prepend_bos`).
    With `chat`, the tokenizer's chat template wraps the bare question and the answer follows its
    generation prompt. `baseline` is what the unsteered run is asked (None: the same as the steered
    ones).

    `strict_span` finds the reference's span as the paper's authors do: from the first place where
    gold stands, be it in the question, over as many characters as gold and explanation have; the
    line break between the two costs the last one.
    """

    question: str = "Question: {question}\nAnswer and explanation:"
    reference: str = "\n{answer}\n{explanation}"
    explain: str = "Question: {question}\nAnswer: {answer}\nExplanation:"
    baseline: str | None = None
    prepend_bos: bool | None = None
    chat: bool = False
    strict_span: bool = False

    def __post_init__(self) -> None:
        for name, fields in (
            ("question", ("question",)),
            ("reference", ("answer", "explanation")),
            ("explain", ("question", "answer")),
            ("baseline", ("question",)),
        ):
            text = getattr(self, name)
            if text is None:
                continue
            missing = [field for field in fields if "{" + field + "}" not in text]
            if missing:
                raise ConfigError(
                    f"the {name} template must contain {{{missing[0]}}}, but got {text!r}."
                )


def tokenize(
    model: HookedModel,
    text: str,
    *,
    prepend_bos: bool | None = None,
    chars: tuple[int, int] | None = None,
) -> Prompt:
    """Tokenize `text`; `chars` is a half-open character range that becomes the prompt's token span.

    Raises:
        ModelError: if the tokenizer cannot tell which characters a token covers.
        SpanError: if no token other than the unknown one covers `chars`.
    """
    tokenizer: Any = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            "the model's tokenizer must be a fast one (it tells which characters a token covers), "
            f"but got {type(tokenizer).__name__}; open it with AutoTokenizer.from_pretrained(...)."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = list(encoded["input_ids"])
    offsets = list(encoded["offset_mapping"])
    if prepend_bos is None:
        prepend_bos = bool(getattr(model.cfg, "default_prepend_bos", True))
    bos = tokenizer.bos_token_id
    if prepend_bos and bos is not None and tokens[:1] != [bos]:
        tokens.insert(0, bos)
        offsets.insert(0, (0, 0))
    special = _special_ids(tokenizer)
    span = None
    if chars is not None:
        covering = [
            i for i, (s, e) in enumerate(offsets) if e > s and e > chars[0] and s < chars[1]
        ]
        if all(tokens[i] in special | {tokenizer.unk_token_id} for i in covering):
            raise SpanError(
                f"the answer must be found in the reference's tokens, but {text[slice(*chars)]!r} "
                "has no known token of its own; give an answer the tokenizer can write."
            )
        span = (covering[0], covering[-1] + 1)
    return Prompt(
        text=text,
        tokens=tuple(tokens),
        str_tokens=tuple(tokenizer.convert_ids_to_tokens(tokens)),
        special=tuple(i for i, token in enumerate(tokens) if token in special),
        span=span,
    )


def continuation(model: HookedModel, prompt: Prompt, text: str) -> tuple[int, ...]:
    """The tokens of `text` behind the prompt, as one text gives them where that begins with the
    prompt's own tokens."""
    head = len(prompt.tokens)
    bos = (model.tokenizer.bos_token_id,)
    whole = tokenize(model, prompt.text + text, prepend_bos=prompt.tokens[:1] == bos).tokens
    if whole[:head] == prompt.tokens:
        return whole[head:]
    return tokenize(model, text, prepend_bos=False).tokens


def question_prompt(
    model: HookedModel, question: str, template: Template | None = None, *, prefix: str = ""
) -> Prompt:
    """The steered prompt: the question, waiting for its answer, behind `prefix` if there is one."""
    template = template or Template()
    text = _question_text(model, question, template, prefix)
    return tokenize(model, text, prepend_bos=template.prepend_bos)


def baseline_prompt(model: HookedModel, question: str, template: Template | None = None) -> Prompt:
    """What the unsteered run is asked: the steered prompt, unless the template has another."""
    template = template or Template()
    if template.baseline is not None:
        template = replace(template, question=template.baseline)
    return question_prompt(model, question, template)


def answer_prefix(answer: str, explanation: str) -> str:
    """What `answer_in_prompt` puts before a question: gold and explanation."""
    return "\n".join(part for part in (answer, explanation) if part) + "\n\n"


def explanation_prompt(
    model: HookedModel, question: str, answer: str, template: Template | None = None
) -> Prompt:
    """Question and gold answer; the model's continuation is its own explanation."""
    template = template or Template()
    text = template.explain.format(question=question, answer=answer)
    if template.chat:
        text = chat_text(model, [Message("user", text)])
    return tokenize(model, text, prepend_bos=template.prepend_bos)


def reference_prompt(
    model: HookedModel,
    question: str,
    answer: str,
    explanation: str = "",
    template: Template | None = None,
) -> Prompt:
    """The reference text; its span is the tokens of gold + explanation, question and BOS excluded.

    Raises:
        SpanError: if the answer has no token of its own in the text.
    """
    template = template or Template()
    head = _question_text(model, question, template)
    before, _, after = template.reference.partition("{answer}")
    if template.chat:
        before = before.lstrip("\n")
    lead = before.format(explanation=explanation)
    # an empty explanation leaves no line behind it
    text = head + lead + answer + after.format(answer=answer, explanation=explanation).rstrip("\n")
    start = len(head) + len(lead)
    if not answer.strip():
        raise SpanError(
            f"the answer must be found in the reference's tokens, but {answer!r} is white space."
        )
    tokenize(model, text, prepend_bos=template.prepend_bos, chars=(start, start + len(answer)))
    stop = len(text)
    if template.strict_span:
        start = text.index(answer)
        stop = start + len(answer) + len(explanation)
    return tokenize(model, text, prepend_bos=template.prepend_bos, chars=(start, stop))


def _special_ids(tokenizer: Any) -> set[int]:
    """BOS, padding, chat markers and the like; the unknown token only where it doubles as one."""
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = marked | set(tokenizer.all_special_ids)
    return ids if tokenizer.unk_token_id in named else ids - {tokenizer.unk_token_id}


def _question_text(model: HookedModel, question: str, template: Template, prefix: str = "") -> str:
    if template.chat:
        return chat_text(model, [Message("user", prefix + question)])
    return prefix + template.question.format(question=question)
