from __future__ import annotations

from pathlib import Path

import pytest

from fusion_lens.errors import ConfigError
from fusion_lens.messages import Message, chat_text, has_chat_template, plain_text
from fusion_lens.models import HookedModel, load_model

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and loop.last %}{{ raise_exception('alone') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
TALK = (
    Message("system", "Be brief."),
    Message("user", "Who?"),
    Message("assistant", "Ada"),
)


@pytest.fixture
def talking(tiny_folder: Path) -> HookedModel:
    """The tiny model with a chat template."""
    model = load_model(tiny_folder)
    model.tokenizer.chat_template = TEMPLATE
    return model


def test_a_chat_template_writes_every_message_and_opens_the_assistants_turn(talking) -> None:
    assert has_chat_template(talking)
    assert chat_text(talking, TALK[:2]) == (
        "<s>system: Be brief.</s><s>user: Who?</s><s>assistant: "
    )


def test_the_assistants_own_last_message_is_continued(talking) -> None:
    assert chat_text(talking, TALK) == (
        "<s>system: Be brief.</s><s>user: Who?</s><s>assistant: Ada"
    )


def test_a_template_that_refuses_the_messages_is_a_setting_out_of_range(talking) -> None:
    with pytest.raises(ConfigError, match=r"must take the messages \(system\), but got: alone\.$"):
        chat_text(talking, TALK[:1])


def test_without_a_template_there_is_no_chat(tiny) -> None:
    assert not has_chat_template(tiny)
    with pytest.raises(ConfigError, match="chat=True needs a tokenizer with a chat template"):
        chat_text(tiny, TALK)


def test_plainly_a_message_is_its_text_and_several_stand_apart() -> None:
    assert plain_text(TALK[1:2]) == "Who?"
    assert plain_text(TALK) == "Be brief.\n\nWho?\n\nAda"


def test_a_role_is_one_of_three() -> None:
    with pytest.raises(ConfigError, match="role must be one of system, user, assistant, but got"):
        Message("tool", "4")
