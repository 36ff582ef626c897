"""What goes into generation and what comes out, and how a token is chosen.

Knows nothing of models: rows and completions are values, and choosing is tensor maths on logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fusion_lens.differences import marked_words
from fusion_lens.errors import ConfigError, one_of
from fusion_lens.executors import EXECUTORS
from fusion_lens.plans import Plan
from fusion_lens.prompts import Prompt
from fusion_lens.tables import Cell, Section, Shows


@dataclass(frozen=True, slots=True)
class Row:
    """One text to write: a prompt, the plan that steers it (None: unsteered), and the seed of its
    samples."""

    prompt: Prompt
    plan: Plan | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"0 <= seed < 2**63 must hold, but got {self.seed}.")

    @property
    def needs_sequence(self) -> bool:
        """Whether its plan forbids a KV cache."""
        return self.plan is not None and self.plan.needs_sequence


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How to decode.

    Temperature 0 is greedy; above it, each row draws from a generator of its own seed. `slots` is
    the number of rows that run at once and `cache_length` the positions each has room for; None
    takes them from the device and the rows. A row's numbers depend on nothing but these two and the
    number of threads, to the last bit: not on its neighbours and not on its place among them
    (docs/engine.md).

    `stop_at_eos=False` writes `max_new_tokens` whatever comes. `executor` is "lean", "hooks" (the
    reference), or "auto": lean where the model allows it. `keep_logits` keeps every step's logits
    on the completion.
    """

    max_new_tokens: int = 48
    temperature: float = 0.0
    slots: int | None = None
    cache_length: int | None = None
    stop_at_eos: bool = True
    executor: str = "auto"
    use_cache: bool = True
    keep_logits: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "slots", "cache_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, but got {value}.")
        one_of("executor", self.executor, EXECUTORS)
        if not 0.0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or above, but got {self.temperature}.")


@dataclass(frozen=True, slots=True)
class Completion(Shows):
    """What a row wrote: text without prompt, stop token and special tokens.

    `tokens` hold the stop token, if the row `ended`. Not `finite`: a step's logits held NaN or
    infinity; the row ended there, and its text means nothing. `margin` is the smallest gap between
    the two highest logits of a greedy step: below about 1e-4, another slot shape may flip a token.
    """

    text: str
    tokens: tuple[int, ...] = field(repr=False)
    ended: bool
    finite: bool = True
    margin: float | None = field(default=None, repr=False, compare=False)
    logits: Float[Tensor, "step d_vocab"] | None = field(default=None, repr=False, compare=False)

    def table(self) -> Section:
        """Its text, and how it came about."""
        return Section("completion", ("", ""), (("text", self.text), *self._told()))

    def beside(self, unsteered: Completion) -> Section:
        """A table of both, with the words that differ from the unsteered text marked."""
        marked = marked_words(unsteered.text, self.text)
        rows: list[tuple[Cell, ...]] = [("text", unsteered.text, marked)]
        told = zip(unsteered._told(), self._told(), strict=True)
        rows += [(name, before, after) for (name, before), (_, after) in told]
        return Section("steered beside unsteered", ("", "unsteered", "steered"), tuple(rows))

    def _told(self) -> tuple[tuple[str, str], ...]:
        return (
            ("tokens", f"{len(self.tokens)}, {'ended' if self.ended else 'cut off'}"),
            ("smallest margin", "-" if self.margin is None else f"{self.margin:.3g}"),
            ("logits", "finite" if self.finite else "not finite: the text means nothing"),
        )


@dataclass(slots=True, eq=False)
class Tape:
    """What a batch of rows has written so far, on the model's device, changed in place.

    A row is `going` until it writes a stop token, has no room left, or its logits are not finite;
    from then on its step changes nothing.
    """

    stops: Int[Tensor, " stops"]
    temperature: float
    going: Bool[Tensor, " row"]
    finite: Bool[Tensor, " row"]
    count: Int[Tensor, " row"]
    written: Int[Tensor, "row room"]
    margins: Float[Tensor, "row room"]
    uniforms: Float[Tensor, "row room"]
    keep_logits: bool
    logits: Float[Tensor, "row room d_vocab"] | None = None

    @staticmethod
    def blank(
        n_rows: int, config: GenerationConfig, stops: frozenset[int], device: torch.device
    ) -> Tape:
        """A tape on which no row is going."""
        room = config.max_new_tokens + 1  # the last column takes what a row writes that has ended
        return Tape(
            stops=torch.tensor(
                sorted(stops if config.stop_at_eos else ()), device=device, dtype=torch.long
            ),
            temperature=config.temperature,
            going=torch.zeros(n_rows, dtype=torch.bool, device=device),
            finite=torch.ones(n_rows, dtype=torch.bool, device=device),
            count=torch.zeros(n_rows, dtype=torch.long, device=device),
            written=torch.zeros((n_rows, room), dtype=torch.long, device=device),
            margins=torch.full((n_rows, room), torch.inf, device=device),
            uniforms=torch.zeros((n_rows, room), dtype=torch.float64, device=device),
            keep_logits=config.keep_logits,
        )

    def start(self, at: Sequence[int], rows: Sequence[Row]) -> None:
        """Begin these rows at these places."""
        index = torch.tensor(at, device=self.going.device)
        self.going[index] = True
        self.finite[index] = True
        self.count[index] = 0
        self.margins[index] = torch.inf
        if self.temperature > 0.0:
            self.uniforms[index] = torch.stack(
                [_uniforms(row.seed, self.uniforms.shape[1]) for row in rows]
            ).to(index.device)

    def step(
        self, logits: Float[Tensor, "row d_vocab"], of: Bool[Tensor, " row"] | None = None
    ) -> Int[Tensor, " row"]:
        """Choose every row's next token and write it down; the tokens chosen. With `of`, only those
        rows move on."""
        column = self.count[:, None]
        if self.keep_logits:
            self._keep(logits)
        best, greedy = logits.max(dim=-1, keepdim=True)
        chosen = greedy
        if self.temperature > 0.0:
            chosen = _sample(logits, self.temperature, self.uniforms.gather(1, column))
        moving = self.going if of is None else self.going & of
        # a masked vocabulary may hold -inf; its maximum is finite all the same
        self.finite &= ~moving | torch.isfinite(best[:, 0])
        self.going &= self.finite
        # what a row writes that does not move is written over when it does
        self.written.scatter_(1, column, chosen)
        if self.temperature == 0.0:
            gap = best - logits.scatter(1, greedy, -torch.inf).amax(dim=-1, keepdim=True)
            self.margins.scatter_(1, column, gap.to(self.margins.dtype))
        self.count += moving & self.finite
        ended = torch.isin(chosen[:, 0], self.stops) | (self.count >= self.written.shape[1] - 1)
        self.going &= ~(moving & ended)
        return chosen[:, 0]

    def completion(self, row: int, decode: Callable[[list[int]], str]) -> Completion:
        """What a row has written; `decode` makes text of tokens."""
        count = int(self.count[row])
        tokens = self.written[row, :count].tolist()
        ended = bool(tokens) and tokens[-1] in self.stops.tolist()
        margin = self.margins[row, :count].amin().item() if count else torch.inf
        return Completion(
            text=decode(tokens[:-1] if ended else tokens),
            tokens=tuple(tokens),
            ended=ended,
            finite=bool(self.finite[row]),
            margin=None if margin == torch.inf else margin,
            logits=None if self.logits is None else self.logits[row, :count].to("cpu", copy=True),
        )

    def _keep(self, logits: Float[Tensor, "row d_vocab"]) -> None:
        if self.logits is None:
            self.logits = logits.new_zeros((*self.written.shape, logits.shape[-1]))
        self.logits[torch.arange(len(logits), device=logits.device), self.count] = logits


def _uniforms(seed: int, number: int) -> Float[Tensor, " room"]:
    return torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _sample(
    logits: Float[Tensor, "row d_vocab"], temperature: float, uniform: Float[Tensor, "row 1"]
) -> Int[Tensor, "row 1"]:
    scaled = torch.nan_to_num(logits.double() / temperature)
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    point = uniform * cumulative[:, -1:]
    return torch.searchsorted(cumulative, point, right=True).clamp(max=logits.shape[-1] - 1)
