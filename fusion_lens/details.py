"""What a run keeps of every question besides its scores: layers, tokens, features; on disk as
`details.jsonl`, a line per question.

A completion says what steering did to the answer; these say where it was taken from, where it went
in, and which tokens it made likelier.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion_lens.json_lines import read_lines
from fusion_lens.typed_json import typed

DETAILS = "details.jsonl"


@dataclass(frozen=True, slots=True)
class Marked:
    """A text token by token, and the positions that are marked in it."""

    tokens: tuple[str, ...]
    marked: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(not 0 <= t < len(self.tokens) for t in self.marked):
            raise ValueError(f"positions must be below {len(self.tokens)}, but got {self.marked}")


@dataclass(frozen=True, slots=True)
class Trace:
    """One arm's completion token by token: log p of each token, in nats, given the prompt and the
    tokens before it, with the arm's plan and without any."""

    arm: str
    tokens: tuple[str, ...]
    steered: tuple[float, ...]
    unsteered: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.tokens) == len(self.steered) == len(self.unsteered):
            raise ValueError("every token must have two log-probabilities")

    @property
    def shifts(self) -> tuple[float, ...]:
        """How far steering moved each token's log-probability, in nats."""
        return tuple(a - b for a, b in zip(self.steered, self.unsteered, strict=True))


@dataclass(frozen=True, slots=True)
class FeatureShare:
    """A sparse feature's part in what a plan injects; as `attribution.FeatureEffect`."""

    layer: int | None
    feature: int
    effect: float
    share: float | None
    label: str


@dataclass(frozen=True, slots=True)
class Detail:
    """One question's layers, tokens and features.

    `delta_norms` and `base_norms` are |h[l] - mu[l]| and |mu[l]| per layer, in residual units;
    `generic_share` is that of `controls`, None without other questions. `captured` is the reference
    text, marked where its mean was taken; `steered` the prompt, marked where a plan injects.
    `features` are those of the plan of `features_of`, the largest first.
    """

    question_id: str
    delta_norms: tuple[float, ...]
    base_norms: tuple[float, ...]
    generic_share: tuple[float, ...] | None
    captured: Marked
    steered: Marked
    traces: tuple[Trace, ...] = ()
    features: tuple[FeatureShare, ...] = ()
    features_of: str | None = None

    def __post_init__(self) -> None:
        n_layers = len(self.delta_norms)
        if not len(self.base_norms) == len(self.generic_share or self.base_norms) == n_layers:
            raise ValueError(f"norms and shares must be of {n_layers} layers each")

    @property
    def relative_norms(self) -> tuple[float, ...]:
        """|h[l] - mu[l]| / |mu[l]| per layer; infinite where the base is 0."""
        return tuple(
            delta / base if base else float("inf")
            for delta, base in zip(self.delta_norms, self.base_norms, strict=True)
        )


def load_details(folder: Path) -> tuple[Detail, ...]:
    """Those of a run; none where it kept none.

    Raises:
        InputFileError: if the file is malformed; names the line.
    """
    path = folder / DETAILS
    return read_lines(path, read_detail, noun="a question's details") if path.is_file() else ()


def read_detail(content: Any) -> Detail:
    """That of a line; refuses what is malformed with ValueError."""
    return typed(Detail, content)
