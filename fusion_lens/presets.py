"""What a sweep found on a few questions: where the searches of others start on the same model.

A preset knows the questions it was made on by a digest of their words, so that nobody starts a
search where the very question that is reported was tried out before.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from fusion_lens.errors import ConfigError, SearchError
from fusion_lens.identity import ModelIdentity
from fusion_lens.questions import Question
from fusion_lens.scores import words
from fusion_lens.segments import Segment, check_segments
from fusion_lens.starts import LayerCoeffs, by_layer
from fusion_lens.tables import Section, Shows


@dataclass(frozen=True, slots=True)
class Preset(Shows):
    """Coefficients to start from, best first, one per segment, with the mean `gains` in objective
    that each had over the zero plan on the `questions`, which are held as digests of their texts.

    `weight` is that of overlap in the objective; `versions` are those it was made with.
    """

    model: ModelIdentity
    segments: tuple[Segment, ...]
    starts: tuple[tuple[float, ...], ...]
    gains: tuple[float, ...]
    weight: float
    questions: tuple[str, ...]
    versions: dict[str, str]

    def __post_init__(self) -> None:
        for start in self.starts:
            check_segments(self.segments, start, self.model.n_layers)
        if len(self.gains) != len(self.starts) or not all(map(math.isfinite, self.gains)):
            raise ConfigError(
                "every start of a preset must have a finite gain, but got "
                f"{len(self.starts)} starts and the gains {self.gains}."
            )
        if not 0.0 <= self.weight <= 1.0:
            raise ConfigError(f"0 <= weight <= 1 must hold, but got {self.weight=}.")
        if not self.questions:
            raise ConfigError("a preset must be made on at least one question, but got none.")

    def table(self) -> Section:
        """The starts with their gains."""
        names = tuple(segment.name for segment in self.segments)
        rows = tuple(
            (str(n), *(f"{coeff:.3f}" for coeff in start), f"{gain:+.3f}")
            for n, (start, gain) in enumerate(zip(self.starts, self.gains, strict=True), start=1)
        )
        title = f"preset for {self.model.name}, of {len(self.questions)} questions"
        notes = () if rows else ("nothing was better than the zero plan: it has no start",)
        return Section(title, ("start", *names, "mean gain"), rows, notes)


def preset_starts(
    preset: Preset, model: ModelIdentity, questions: Sequence[Question]
) -> tuple[LayerCoeffs, ...]:
    """The starts of a preset for these questions of a model, best first.

    Raises:
        SearchError: if the preset is of another model, or was made on one of the questions.
    """
    reason = preset.model.mismatch(model)
    if reason is not None:
        raise SearchError(f"a preset must be of the model that is steered, but {reason}.")
    require_apart(preset.questions, questions, "a preset")
    n_layers = preset.model.n_layers
    return tuple(by_layer(preset.segments, start, n_layers) for start in preset.starts)


def text_digest(text: str) -> str:
    """SHA-256 of the words of a question, whatever its case, spaces and punctuation."""
    return hashlib.sha256(" ".join(words(text)).encode()).hexdigest()


def require_apart(digests: Collection[str], questions: Sequence[Question], what: str) -> None:
    """Make sure that none of the questions was used before.

    Raises:
        SearchError: if one was.
    """
    seen = [question.id for question in questions if text_digest(question.question) in digests]
    if seen:
        raise SearchError(
            f"{what} must be of other questions than those that start from it, but got "
            f"{len(seen)} of the same, {seen[0]!r} among them; take questions of another split."
        )
