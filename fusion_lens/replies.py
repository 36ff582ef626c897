"""Requests of a harness (messages, a plan, how long, how random) -> replies, many at once.

A harness asks one text at a time, each with settings of its own; what can share a batch of
`generation` does: rows with the same limit and temperature. A request that fails takes no other
with it. Knows no harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fusion_lens.decoding import Completion, GenerationConfig, Row
from fusion_lens.errors import ConfigError, FusionLensError
from fusion_lens.generation import check_context, generate
from fusion_lens.messages import Message, chat_text, plain_text
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan
from fusion_lens.prompts import Prompt, tokenize


@dataclass(frozen=True, slots=True)
class Request:
    """One text to write. `max_tokens` is the most new tokens, fewer where the model's context ends;
    the text ends before the first of `stop` that comes.

    Raises:
        ConfigError: if there is no message, `max_tokens` is below 1, or a stop text is empty.
    """

    messages: tuple[Message, ...]
    plan: Plan | None = None
    max_tokens: int = 48
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.messages or self.max_tokens < 1 or "" in self.stop:
            raise ConfigError(
                "a request must have a message, max_tokens of at least 1 and no empty stop text, "
                f"but got ({len(self.messages)} messages, {self.max_tokens=}, {self.stop=})."
            )


@dataclass(frozen=True, slots=True)
class Reply:
    """What was written and why it ends: "stop" (the model ended it, or a stop text came),
    "max_tokens" or "model_length" (the context is full). `tokens_out` counts all that were
    generated. Not `finite`: the logits held NaN or infinity, and the text means nothing.
    """

    text: str
    stop_reason: Literal["stop", "max_tokens", "model_length"]
    tokens_in: int
    tokens_out: int
    finite: bool = True


def request_prompt(model: HookedModel, messages: Sequence[Message], *, chat: bool) -> Prompt:
    """The messages as the model reads them, by the chat template or plainly (`messages`).

    Raises:
        ConfigError: if the template is missing or refuses them.
    """
    return tokenize(model, chat_text(model, messages) if chat else plain_text(messages))


def write_replies(
    model: HookedModel,
    requests: Sequence[Request],
    *,
    chat: bool = False,
    config: GenerationConfig | None = None,
) -> list[Reply | Exception]:
    """A reply per request, in their order, or the error of that one.

    Of `config`, `slots`, `cache_length` and `executor` hold for all; limit and temperature are the
    requests' own.
    """
    config = config or GenerationConfig()
    replies: dict[int, Reply | Exception] = {}
    alike: dict[GenerationConfig, dict[int, Row]] = {}
    for i, request in enumerate(requests):
        try:
            row = Row(
                request_prompt(model, request.messages, chat=chat), request.plan, request.seed
            )
            room = max(1, min(request.max_tokens, int(model.cfg.n_ctx) - len(row.prompt.tokens)))
            own = replace(config, max_new_tokens=room, temperature=request.temperature)
            check_context(model, row.prompt, room, config.cache_length)
        except FusionLensError as error:
            replies[i] = error
        else:
            alike.setdefault(own, {})[i] = row
    for own, rows in alike.items():
        written = _written(model, list(rows.values()), own)
        for (i, row), done in zip(rows.items(), written, strict=True):
            replies[i] = (
                done
                if isinstance(done, Exception)
                else _reply(requests[i], row, done, own.max_new_tokens)
            )
    return [replies[i] for i in range(len(requests))]


def _written(
    model: HookedModel, rows: Sequence[Row], config: GenerationConfig
) -> Sequence[Completion | Exception]:
    try:
        return generate(model, rows, config)
    except Exception as error:
        if len(rows) == 1:
            return [error]
    # one of them fails, and the others are not to
    return [done for row in rows for done in _written(model, [row], config)]


def _reply(request: Request, row: Row, done: Completion, room: int) -> Reply:
    ends = [place for stop in request.stop if (place := done.text.find(stop)) >= 0]
    return Reply(
        text=done.text[: min(ends)] if ends else done.text,
        stop_reason="stop"
        if ends or done.ended
        else "max_tokens"
        if room == request.max_tokens
        else "model_length",
        tokens_in=len(row.prompt.tokens),
        tokens_out=len(done.tokens),
        finite=done.finite,
    )
