"""inspect-ai's requests -> replies of a steered model: the provider `fusion_lens/<model>`.

`fusion_lens/atlas` is the bundled model, else what follows the first slash is a checkpoint folder
or a hub name. Model arguments (`-M name=value`) are the fields of `inspect_args.ModelArgs`. What
samples ask at the same time is written as one batch (`gatherer`, `replies`), and models opened
alike are opened once. inspect-ai finds provider and task by the entry point
`fusion_lens.inspect_tasks`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, final
from weakref import WeakValueDictionary

from fusion_lens.errors import ConfigError, FusionLensError, MissingExtraError
from fusion_lens.gatherer import Gatherer, one_at_a_time
from fusion_lens.identity import identify
from fusion_lens.inspect_args import ModelArgs, read_model_args
from fusion_lens.messages import Message, has_chat_template
from fusion_lens.models import HookedModel, load_model
from fusion_lens.plan_files import load_plan
from fusion_lens.plans import Plan
from fusion_lens.replies import Reply, Request, write_replies

try:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        ContentText,
        GenerateConfig,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        modelapi,
    )
    from inspect_ai.tool import ToolChoice, ToolInfo
except ImportError as error:
    raise MissingExtraError("inspect-ai", "inspect") from error

# what would change the text, or is asked for beside it, and is not to be had here
_REFUSED = (
    *("top_p", "top_k", "frequency_penalty", "presence_penalty", "logit_bias"),
    *("num_choices", "best_of", "logprobs", "top_logprobs", "prompt_logprobs"),
    *("response_schema", "modalities"),
)
_WITHOUT_EFFECT = {"top_p": 1.0, "num_choices": 1, "best_of": 1}
_MOST_TOKENS = 2048
_ROOM = 2  # the share of the context that a reply may fill where nobody says: one in so many


@final
class SteeredAPI(ModelAPI):
    """A steered model as inspect-ai asks it. One that carries no plan answers unsteered.

    A request's own plan, a file's name as `extra_body={"plan": ...}` of its `GenerateConfig`, takes
    the place of none: a model that has one refuses it. Temperature is 0 unless set; samples at a
    higher one draw a seed unless it is set, and the reply's metadata names it.

    Raises:
        ConfigError: if an argument is not known or out of range, or `chat` is True without a chat
            template.
        ModelError: if the model cannot be opened.
        PlanError: if the plan cannot be read or belongs to another model.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        **model_args: Any,
    ) -> None:
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        if base_url is not None or api_key is not None:
            raise ConfigError(
                "a model of fusion_lens runs in this process and takes neither base_url nor "
                "api_key; leave them out."
            )
        self._args = read_model_args(model_args)
        self.model = _open(model_name, self._args)
        self.chat = self._args.chat is True or (
            self._args.chat == "auto" and has_chat_template(self.model)
        )
        if self.chat and not has_chat_template(self.model):
            raise ConfigError(
                f"chat=true needs a tokenizer with a chat template; that of {model_name} has none."
            )
        with one_at_a_time:
            self._plan = None if self._args.plan is None else self._opened_plan(self._args.plan)
        self._gatherer: Gatherer[tuple[Request, str | None], Reply] = Gatherer(
            self._write, most=self._args.batch_size, window=self._args.window
        )

    def close(self) -> None:
        """End the thread that writes."""
        self._gatherer.close()

    def connection_key(self) -> str:
        """Every model waits for its own batches."""
        return f"{self.model_name}:{id(self)}"

    def max_connections(self) -> int:
        """As many as a batch has."""
        return self._args.batch_size

    def max_tokens(self) -> int:
        """Where nobody sets it: 2048, or half of a shorter context."""
        return min(_MOST_TOKENS, int(self.model.cfg.n_ctx) // _ROOM)

    def collapse_user_messages(self) -> bool:
        """Most chat templates want turns that alternate."""
        return True

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """One reply; see the class.

        Raises:
            ConfigError: if tools, media or a setting are asked for that are not to be had.
            ContextLengthError: if the messages leave no room for a reply.
            PlanError: if the request's plan cannot be read or belongs to another model.
        """
        if tools:
            raise ConfigError(
                "a model of fusion_lens calls no tools, but got "
                f"{', '.join(tool.name for tool in tools)}; use a task or solver without."
            )
        started = time.monotonic()
        request = self._request(input, config)
        own_plan = self._own_plan(config.extra_body or {})
        reply = await asyncio.wrap_future(self._gatherer.submit((request, own_plan)))
        return self._output(request, reply, time.monotonic() - started)

    def _request(self, input: Sequence[ChatMessage], config: GenerateConfig) -> Request:
        for name in _REFUSED:
            value = getattr(config, name)
            if value not in (None, False, _WITHOUT_EFFECT.get(name)):
                raise ConfigError(
                    f"a model of fusion_lens has no {name}, but got {value!r:.60}; leave it out."
                )
        temperature = float(config.temperature or 0.0)
        seed = config.seed
        if seed is None:
            seed = random.SystemRandom().randrange(2**31) if temperature else 0
        return Request(
            messages=tuple(map(_message, input)),
            plan=self._plan,
            max_tokens=config.max_tokens or self.max_tokens(),
            temperature=temperature,
            seed=seed,
            stop=tuple(config.stop_seqs or ()),
        )

    def _own_plan(self, extra: Mapping[str, Any]) -> str | None:
        """The file of the plan that a request brings."""
        if not extra:
            return None
        path = extra.get("plan")
        if len(extra) > 1 or not isinstance(path, str):
            raise ConfigError(
                "extra_body must be {'plan': the name of a file}, but has the keys "
                f"{', '.join(extra)}."
            )
        if self._args.plan is not None:
            raise ConfigError(
                f"one plan must steer a reply, but the model has {self._args.plan} and the "
                f"request {path}; leave one out."
            )
        return path

    def _write(self, asked: Sequence[tuple[Request, str | None]]) -> list[Reply | Exception]:
        steered = [self._steered(request, path) for request, path in asked]
        replies = iter(
            write_replies(
                self.model,
                [each for each in steered if isinstance(each, Request)],
                chat=self.chat,
                config=self._args.generation(),
            )
        )
        return [next(replies) if isinstance(each, Request) else each for each in steered]

    def _steered(self, request: Request, path: str | None) -> Request | Exception:
        try:
            return request if path is None else replace(request, plan=self._opened_plan(path))
        except FusionLensError as error:
            return error

    def _opened_plan(self, path: str) -> Plan:
        plan = load_plan(path)
        plan.check(identify(self.model))
        return plan * self._args.scale

    def _output(self, request: Request, reply: Reply, seconds: float) -> ModelOutput:
        message = ChatMessageAssistant(content=reply.text, model=self.model_name, source="generate")
        reason = reply.stop_reason if reply.finite else "unknown"
        return ModelOutput(
            model=self.model_name,
            choices=[ChatCompletionChoice(message=message, stop_reason=reason)],
            usage=ModelUsage(
                input_tokens=reply.tokens_in,
                output_tokens=reply.tokens_out,
                total_tokens=reply.tokens_in + reply.tokens_out,
            ),
            time=seconds,
            metadata={"seed": request.seed} if request.temperature else None,
            error=None if reply.finite else "the logits were not finite: the text means nothing",
        )


def _message(message: ChatMessage) -> Message:
    content = message.content
    others: list[str] = (
        []
        if isinstance(content, str)
        else [part.type for part in content if not isinstance(part, ContentText)]
    )
    if message.role == "tool" or getattr(message, "tool_calls", None):
        others.append("tool call")
    if others:
        raise ConfigError(
            "a model of fusion_lens reads text alone, but a message holds "
            f"{', '.join(others)}; use a task without."
        )
    return Message(message.role, message.text)


_OPENED: WeakValueDictionary[tuple[Any, ...], HookedModel] = WeakValueDictionary()


def _open(name: str, args: ModelArgs) -> HookedModel:
    options = args.opening()
    key = (name, *options.values())
    model = _OPENED.get(key)
    if model is None:
        with one_at_a_time:
            model = load_model(None if name == "atlas" else name, **options)
        _OPENED[key] = model
    return model


@modelapi(name="fusion_lens")
def steered() -> type[ModelAPI]:
    """What inspect-ai calls `fusion_lens/...`."""
    return SteeredAPI
