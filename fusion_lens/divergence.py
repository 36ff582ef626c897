"""How far steering moves the model on text that has nothing to do with the question.

KL(unsteered || steered) of the next token, in nats, averaged over the tokens of given texts, which
are read teacher-forced. A text counts as written by the model: its BOS is the prompt, all after it
"completion".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusion_lens.activations import at_least_float32, left_padded, padded_length, same_shape
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError, InputFileError
from fusion_lens.executors import Executor, executor_of
from fusion_lens.hooks import Cursor, batch_steering
from fusion_lens.models import HookedModel, evaluating
from fusion_lens.plans import Plan
from fusion_lens.prompts import Layout, Prompt, tokenize
from fusion_lens.steps import AFTER_PROMPT

WINDOW = 64
_ROWS = 16
_LOGITS_AT_ONCE = 2**27


def unrelated_texts(model: HookedModel, path: str | Path, *, n_tokens: int = 2000) -> list[Prompt]:
    """The beginning of a text file in pieces of `WINDOW` tokens, each behind a BOS if the model has
    one: as few as hold `n_tokens` besides.

    Raises:
        InputFileError: if the file cannot be read or holds fewer tokens.
    """
    return pieces_of(model, read_text(path), path, n_tokens=n_tokens)


def read_text(path: str | Path) -> str:
    """A text file.

    Raises:
        InputFileError: if it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(path, f"must be readable UTF-8 text: {error}") from error


def pieces_of(
    model: HookedModel, text: str, path: str | Path, *, n_tokens: int = 2000
) -> list[Prompt]:
    """`unrelated_texts` of what was read from `path`.

    Raises:
        InputFileError: if it holds fewer tokens.
    """
    whole = tokenize(model, text)
    head = _leading(whole)
    own = WINDOW - head
    n_pieces = -(-n_tokens // own)
    if len(whole.tokens) < head + n_pieces * own:
        raise InputFileError(
            path,
            f"must hold at least {n_pieces * own} tokens, but holds {len(whole.tokens) - head}",
        )
    return [
        _piece(whole, head, range(start, start + own))
        for start in range(head, head + n_pieces * own, own)
    ]


def n_counted(text: Prompt) -> int:
    """The tokens of a text that count: all but its BOS."""
    return len(text.tokens) - _leading(text)


def kl_unrelated(
    model: HookedModel,
    texts: Sequence[Prompt],
    steered: Sequence[Plan | tuple[int, ...]],
    *,
    executor: str = "auto",
    progress: Callable[[int], None] | None = None,
    log: EngineLog | None = None,
) -> list[float | None]:
    """KL(unsteered || steered) in nats per token of `texts`, for each way of steering: a plan, or
    the tokens of a prefix put in front of every text (behind its BOS).

    Every token but a BOS counts once, as the place whose next token is predicted. The mean is in
    float64; None where it is not finite. `progress` is told how often a text was read steered.

    Raises:
        ConfigError: if there is no text.
    """
    if not texts:
        raise ConfigError("there must be at least one unrelated text, but got none.")
    log = log or EngineLog()
    sites = {site for way in steered if isinstance(way, Plan) for site in way.sites}
    run, reason = executor_of(model, executor, sites)
    log.fell_back(reason)
    sums = torch.zeros(len(steered), dtype=torch.float64)
    n_tokens = sum(map(n_counted, texts))
    most = max(1, _LOGITS_AT_ONCE // (WINDOW * int(model.cfg.d_vocab)))

    def read(n_rows: int) -> None:
        sums.zero_()
        n_read = 0
        for batch in _batches(run, texts, min(n_rows, most)):
            unsteered = _read(run, batch, ())
            log_p = at_least_float32(unsteered).log_softmax(dim=-1)
            p = log_p.exp()
            entropy = -_product(p, log_p)
            for i, way in enumerate(steered):
                q = at_least_float32(_read(run, batch, way))
                # sum p (log p - log q), with log q = q - logsumexp q
                kl = torch.logsumexp(q, dim=-1) - _product(p, q) - entropy
                sums[i] += kl.masked_fill(~batch.counted, 0).double().sum().cpu()
                n_read += batch.n_texts
                if progress is not None:
                    progress(n_read)

    with evaluating(model):
        log.halving(min(_ROWS, len(texts)), read)
    return [
        total / n_tokens if math.isfinite(total) else None for total in sums.clamp(min=0).tolist()
    ]


class _Batch:
    """`n_texts` texts of one padded length, and idle rows; `counted` marks the texts' own
    tokens."""

    def __init__(self, texts: Sequence[Prompt], n_rows: int, width: int, device: torch.device):
        full = [*texts, *[texts[0]] * (n_rows - len(texts))]
        self.layouts = [Layout(len(text.tokens), text.special) for text in full]
        self.heads = [text.tokens[: _leading(text)] for text in full]
        self.tails = [text.tokens[_leading(text) :] for text in full]
        self.n_texts = len(texts)
        self.width = width
        counted = torch.zeros((n_rows, width), dtype=torch.bool)
        for row, tail in enumerate(self.tails[: len(texts)]):
            counted[row, width - len(tail) :] = True
        self.counted: Bool[Tensor, "row pos"] = counted.to(device)

    def padded(
        self, prefix: tuple[int, ...], device: torch.device
    ) -> tuple[Int[Tensor, "row pos"], Int[Tensor, "row pos"]]:
        """Tokens and mask, with a prefix behind every BOS."""
        rows = [head + prefix + tail for head, tail in zip(self.heads, self.tails, strict=True)]
        return left_padded(rows, 0, device, width=self.width + len(prefix))


def _batches(run: Executor, texts: Sequence[Prompt], n_rows: int) -> Iterator[_Batch]:
    widths = [padded_length(len(text.tokens), run.multiple) for text in texts]
    for batch in same_shape(widths, lambda _: n_rows):
        yield _Batch([texts[i] for i in batch], n_rows, widths[batch[0]], run.device)


def _read(
    run: Executor, batch: _Batch, way: Plan | tuple[int, ...]
) -> Float[Tensor, "row pos d_vocab"]:
    prefix = way if isinstance(way, tuple) else ()
    plan = None if isinstance(way, tuple) else _on_written(way)
    tokens, mask = batch.padded(prefix, run.device)
    plans = [plan] * len(tokens)
    with run.at_sites(batch_steering(plans, batch.layouts, Cursor(0, tokens.shape[1]))):
        return run.forward(tokens, mask, last=batch.width)


def _product(
    p: Float[Tensor, "row pos d_vocab"], logs: Float[Tensor, "row pos d_vocab"]
) -> Float[Tensor, "row pos"]:
    """sum p * log, where a masked vocabulary's 0 * -inf is 0."""
    return torch.where(p > 0, p * logs, torch.zeros_like(p)).sum(dim=-1)


def _on_written(plan: Plan) -> Plan | None:
    """What a plan does to text behind its prompt: nothing where a step is for the prompt or a token
    of it."""
    steps = tuple(
        replace(step, positions="all") for step in plan.steps if step.positions in AFTER_PROMPT
    )
    return Plan(steps) if steps else None


def _leading(text: Prompt) -> int:
    """How many special tokens a text begins with."""
    return next((t for t in range(len(text.tokens)) if t not in text.special), len(text.tokens))


def _piece(whole: Prompt, head: int, kept: range) -> Prompt:
    places = (*range(head), *kept)
    str_tokens = tuple(whole.str_tokens[t] for t in places)
    return Prompt(
        text="".join(str_tokens[head:]),
        tokens=tuple(whole.tokens[t] for t in places),
        str_tokens=str_tokens,
        special=tuple(i for i, t in enumerate(places) if t in whole.special),
    )
