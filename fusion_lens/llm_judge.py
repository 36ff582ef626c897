"""Completions -> verdicts of a language model of any provider inspect-ai knows. The one door to it.

Two prompts, at temperature 0: a label (CORRECT, INCORRECT, NOT_ATTEMPTED) and, on request, a grade
of 1 to 5 for correctness, relevance and completeness. What the model does not settle is unscored.
Keys come from the environment, where inspect-ai looks for them; nothing here reads or writes them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import threading
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, final

from fusion_lens.errors import ConfigError, MissingExtraError
from fusion_lens.judge_cache import ReplyCache
from fusion_lens.judge_prompts import PARSERS, judge_prompt, parse_grade, parse_label
from fusion_lens.judges import JudgeItem, Verdict
from fusion_lens.scores import extract_answer

if TYPE_CHECKING:
    from inspect_ai.model import Model, ModelAPI, ModelOutput

T = TypeVar("T")

_FIRST_WAIT = 1.0
_LONGEST_WAIT = 120.0
# sampling is transformers' affair there, and it takes no temperature of 0
_MODEL_ARGS: dict[str, dict[str, Any]] = {"hf": {"do_sample": False}}


@dataclass(slots=True)
class JudgeCounts:
    """What a judge has cost. `cached`: replies that needed no request; `failures`: items' replies
    that were none, by reason; `price`: per million tokens (in, out)."""

    price: tuple[float, float] | None = None
    requests: int = 0
    cached: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def cost(self) -> float | None:
        """In the currency of `price`; None without one."""
        if self.price is None:
            return None
        return (self.tokens_in * self.price[0] + self.tokens_out * self.price[1]) / 1e6

    def to_dict(self) -> dict[str, Any]:
        """For a summary."""
        return {**asdict(self), "cost": self.cost}


@dataclass(frozen=True, slots=True)
class _Ask:
    """A prompt, its key in the cache, and whether its reply is a "label" or a "grade"."""

    key: str
    prompt: str
    sought: str

    def found_in(self, text: str) -> bool:
        return PARSERS[self.sought](text) is not None


@dataclass(frozen=True, slots=True)
class _Reply:
    """What came back; with a `fault`, why it counts for nothing."""

    text: str
    fault: str = ""


@final
class LLMJudge:
    """A language model as a `Judge`.

    `model` is named as inspect-ai names it: "openai/gpt-4o", "openai-api/<service>/<name>",
    "anthropic/...", "ollama/...", "hf/<folder>". It is opened when first needed and kept until
    `close()`, or the end of a `with` block. `timeout` is in seconds per request; `max_tokens` has
    to grow for a model that thinks before it replies; `model_args` go to inspect-ai's `get_model`;
    `price` is per million tokens (in, out).

    `cache` is a JSONL file of replies, by the SHA-256 of model, settings and prompt; without one
    they are kept in memory. Only replies with a label or grade are kept. A replayed run needs
    neither key nor model.

    Raises:
        MissingExtraError: if inspect-ai is not installed.
        ConfigError: if a setting is outside its range.
        InputFileError: if `cache` is a file of another kind.
        OutputError: if it cannot be written.
    """

    def __init__(
        self,
        model: str,
        *,
        grade: bool = False,
        cache: str | Path | None = None,
        max_connections: int = 8,
        timeout: float = 60.0,
        retries: int = 4,
        base_url: str | None = None,
        max_tokens: int = 64,
        model_args: Mapping[str, Any] | None = None,
        price: tuple[float, float] | None = None,
    ) -> None:
        try:
            from inspect_ai.model import GenerateConfig
        except ImportError as error:
            raise MissingExtraError("inspect-ai", "judge") from error
        if min(max_connections, max_tokens) < 1 or timeout <= 0 or retries < 0:
            raise ConfigError(
                "max_connections and max_tokens must be at least 1, timeout above 0 and retries at "
                f"least 0, but got ({max_connections=}, {max_tokens=}, {timeout=}, {retries=})."
            )
        self.name = model
        self.grade = grade
        self.counts = JudgeCounts(price)
        self._timeout = timeout
        self._retries = retries
        self._base_url = base_url
        self._model_args = _MODEL_ARGS.get(model.split("/")[0], {}) | dict(model_args or {})
        if "api_key" in self._model_args:
            raise ConfigError("an API key must come from the environment, not from model_args.")
        self._config = GenerateConfig(
            temperature=0.0, max_tokens=max_tokens, max_connections=max_connections
        )
        self._slots = asyncio.Semaphore(max_connections)
        self._cache = ReplyCache(None if cache is None else Path(cache))
        self._model: Model | None = None

    def __enter__(self) -> LLMJudge:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def open(self) -> None:
        """Open the model now, so that a missing key is known before a run and not after it.

        Raises:
            ConfigError: if inspect-ai cannot open it.
        """
        if self._model is None:
            self._model = self._opened()
            self._end = weakref.finalize(self, _start, _loop(), self._model.api.aclose)
            self._end.atexit = False

    def close(self) -> None:
        """End the model's connections; `judge` opens it again."""
        if self._model is not None:
            self._end.detach()
            _start(_loop(), self._model.api.aclose).result()
            self._model = None

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """A verdict per item, in their order; blocks, also inside a running event loop.

        A request that times out, is refused or fails for good, and a reply without a label, leave
        that item unscored with the reason in `explanation`; they are not cached, so that another
        call asks again.

        Raises:
            ConfigError: if the model has to be asked and cannot be opened.
            OutputError: if the cache cannot be written.
        """
        labels = [self._ask("label", item) for item in items]
        grades = [self._ask("grade", item) for item in items if self.grade]
        replies = self._replies([*labels, *grades])
        found = [replies[ask.key] for ask in (*labels, *grades)]
        return [
            _verdict(item, found[i], found[len(items) + i] if self.grade else None)
            for i, item in enumerate(items)
        ]

    def _ask(self, sought: str, item: JudgeItem) -> _Ask:
        prompt = judge_prompt(sought, item)
        settings = {
            "model": self.name,
            "base_url": self._base_url,
            "model_args": self._model_args,
            "temperature": self._config.temperature,
            "max_tokens": self._config.max_tokens,
            "prompt": prompt,
        }
        content = json.dumps(settings, sort_keys=True, default=repr)
        return _Ask(hashlib.sha256(content.encode()).hexdigest(), prompt, sought)

    def _replies(self, asks: Sequence[_Ask]) -> dict[str, _Reply]:
        missing = {ask.key: ask for ask in asks if self._kept(ask) is None}
        self.counts.cached += len(asks) - len(missing)
        fresh: dict[str, _Reply] = {}
        if missing:
            self.open()
            running = _start(_loop(), lambda: self._request_all(missing))
            try:
                fresh = running.result()
            finally:
                # after an interrupt
                running.cancel()
        return {ask.key: fresh.get(ask.key) or _Reply(self._kept(ask) or "") for ask in asks}

    def _kept(self, ask: _Ask) -> str | None:
        """The reply in the cache, if it still says something."""
        text = self._cache.get(ask.key)
        return text if text is not None and ask.found_in(text) else None

    async def _request_all(self, asks: Mapping[str, _Ask]) -> dict[str, _Reply]:
        tasks = [asyncio.create_task(self._request(ask)) for ask in asks.values()]
        try:
            return dict(zip(asks, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()

    async def _request(self, ask: _Ask) -> _Reply:
        async with self._slots:
            reply = await self._attempts(ask)
        if reply.fault:
            self.counts.failures[reply.fault] = self.counts.failures.get(reply.fault, 0) + 1
        else:
            self._cache.put(ask.key, reply.text)
        return reply

    async def _attempts(self, ask: _Ask) -> _Reply:
        from inspect_ai.model import ChatMessageUser

        assert self._model is not None
        # not Model.generate: its retries begin at 3 s and ignore Retry-After, its limit is that of
        # whoever came first in the process, and in a notebook it displays what servers say
        api = self._model.api
        for attempt in range(self._retries + 1):
            self.counts.requests += 1
            try:
                async with asyncio.timeout(self._timeout):
                    result = await api.generate(
                        input=[ChatMessageUser(content=ask.prompt)],
                        tools=[],
                        tool_choice="none",
                        config=self._config,
                    )
                output = result[0] if isinstance(result, tuple) else result
                if isinstance(output, Exception):
                    raise output
                return self._read(ask, output)
            except Exception as error:
                # whatever a provider raises is a missing verdict and not the end of a run
                wait = _wait(api, error, attempt)
                if attempt == self._retries or wait is None:
                    return _Reply("", _reason(error))
            await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns")

    def _read(self, ask: _Ask, output: ModelOutput) -> _Reply:
        if output.usage is not None:
            used = output.usage
            self.counts.tokens_in += (
                used.input_tokens
                + (used.input_tokens_cache_read or 0)
                + (used.input_tokens_cache_write or 0)
            )
            self.counts.tokens_out += used.output_tokens
        return _reply(ask.sought, output)

    def _opened(self) -> Model:
        from inspect_ai.model import get_model

        try:
            model = get_model(
                self.name,
                config=self._config,
                base_url=self._base_url,
                memoize=False,
                **self._model_args,
            )
            model.verify_model_apis()
        except Exception as error:
            # not chained: its text may quote a key
            raise ConfigError(
                f"the judge {self.name} must open, but got {_without_keys(error)}; "
                "see inspect-ai's page on model providers."
            ) from None
        # what an SDK sends again by itself would be neither counted nor limited
        client: Any = getattr(model.api, "client", None)
        if hasattr(client, "max_retries"):
            client.max_retries = 0
        return model


def label_verdict(item: JudgeItem, output: ModelOutput) -> Verdict:
    """What a model's reply to `judge_prompt("label", item)` says of the item, for who asks
    inspect-ai himself; unscored, with the reason in `explanation`, where it names no label."""
    return _verdict(item, _reply("label", output), None)


def _reply(sought: str, output: ModelOutput) -> _Reply:
    text = output.completion.strip()
    if output.empty or not text:
        return _Reply(text, "empty reply")
    if output.stop_reason == "content_filter":
        return _Reply(text, "refused")
    if PARSERS[sought](text) is None:
        cut = output.stop_reason == "max_tokens"
        return _Reply(text, "cut at max_tokens" if cut else f"no single {sought}")
    return _Reply(text)


def _verdict(item: JudgeItem, label: _Reply, grade: _Reply | None) -> Verdict:
    explanation = _told(label)
    if grade is not None:
        explanation += f"; grade: {_told(grade)}"
    return Verdict(
        label=None if label.fault else parse_label(label.text),
        grade=None if grade is None or grade.fault else parse_grade(grade.text),
        answer=extract_answer(item.completion),
        explanation=explanation,
    )


def _told(reply: _Reply) -> str:
    if not reply.fault:
        return reply.text
    return f"unscored, {reply.fault}" + (f": {reply.text}" if reply.text else "")


def _wait(api: ModelAPI, error: Exception, attempt: int) -> float | None:
    """Seconds until another attempt; None: it is of no use, or the server asks for too many."""
    decision = isinstance(error, TimeoutError) or api.should_retry(error)
    if not decision:
        return None
    asked = getattr(decision, "retry_after", None) or 0.0
    wait = max(asked, min(_LONGEST_WAIT, _FIRST_WAIT * 2**attempt))
    return wait if wait <= _LONGEST_WAIT else None


def _reason(error: Exception) -> str:
    """The kind of an error and not its text: servers repeat the key they refuse."""
    status = getattr(error, "status_code", None)
    if isinstance(status, int):
        return f"HTTP {status}"
    name = type(error).__name__
    return "timeout" if "Timeout" in name else name


def _without_keys(error: Exception) -> str:
    # inspect-ai writes "[bold]OPENAI_API_KEY[/bold]"
    text = re.sub(r"\[/?[a-z]+\]", "", " ".join(str(error).split()))
    for name, value in os.environ.items():
        if len(value) > 7 and re.search("KEY|TOKEN|SECRET|PASSWORD", name.upper()):
            text = text.replace(value, "***")
    return f"{type(error).__name__}: {text.rstrip('.')}"


_LOOP_LOCK = threading.Lock()
_LOOPS: list[asyncio.AbstractEventLoop] = []


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all judges, in a thread of its own: a caller may have a running one or
    none, and a client is of no use in another loop than its first."""
    with _LOOP_LOCK:
        if not _LOOPS:
            _LOOPS.append(asyncio.new_event_loop())
            threading.Thread(target=_LOOPS[0].run_forever, name="judges", daemon=True).start()
        return _LOOPS[0]


def _start(
    loop: asyncio.AbstractEventLoop, function: Callable[[], Coroutine[Any, Any, T]]
) -> Future[T]:
    return asyncio.run_coroutine_threadsafe(function(), loop)
