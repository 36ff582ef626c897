"""The messages of a conversation -> one text: by the tokenizer's chat template, or plainly.

By the template the assistant's turn is opened; where the last message is the assistant's own, it is
continued. Plainly the contents stand below each other, an empty line between: a single message is
its text. Knows no tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fusion_lens.errors import ConfigError, one_of
from fusion_lens.models import HookedModel

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Message:
    """What one side said; `role` is one of `ROLES`.

    Raises:
        ConfigError: if it is none of them.
    """

    role: str
    content: str

    def __post_init__(self) -> None:
        one_of("role", self.role, ROLES)


def has_chat_template(model: HookedModel) -> bool:
    """Whether the model's tokenizer knows how its messages are written."""
    return bool(getattr(model.tokenizer, "chat_template", None))


def chat_text(model: HookedModel, messages: Sequence[Message]) -> str:
    """The messages as the chat template writes them.

    Raises:
        ConfigError: if there is no template, or it refuses these messages.
    """
    if not has_chat_template(model):
        raise ConfigError(
            "chat=True needs a tokenizer with a chat template; "
            f"that of {model.cfg.model_name} has none."
        )
    continued = messages[-1].role == "assistant"
    told = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = model.tokenizer.apply_chat_template(
            told,
            tokenize=False,
            add_generation_prompt=not continued,
            continue_final_message=continued,
        )
    except Exception as error:
        # a template is a program: many refuse a system message, or two turns of one side
        raise ConfigError(
            f"the chat template of {model.cfg.model_name} must take the messages "
            f"({', '.join(message.role for message in messages)}), but got: {error}."
        ) from error
    return str(text)


def plain_text(messages: Sequence[Message]) -> str:
    """The messages' contents, an empty line between two."""
    return "\n\n".join(message.content for message in messages)
