"""What to run on every question: the settings that are beside those of the search."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fusion_lens.arms import ARMS, DEFAULT_ARMS, TUNED
from fusion_lens.errors import ConfigError, one_of
from fusion_lens.preparation import TuningConfig


@dataclass(frozen=True, slots=True)
class ExperimentConfig:
    """What to run on every question.

    `segments` divides the layers of the segmented arm; `centre` subtracts the other questions' mean
    delta from every delta; `reach` measures transfer and specificity; `unrelated` is a text file
    for the divergence on unrelated text (None: unscored); `storage` is an Optuna storage URL that
    gets every finished study, named `<question id>/<arm>`.
    """

    arms: tuple[str, ...] = DEFAULT_ARMS
    segments: str | int = "thirds"
    tuning: TuningConfig = field(default_factory=TuningConfig)
    centre: bool = False
    reach: bool = True
    unrelated: Path | None = None
    block_size: int = 64
    storage: str | None = None

    def __post_init__(self) -> None:
        if not self.arms or len(set(self.arms)) != len(self.arms):
            raise ConfigError(f"arms must be different and at least one, but got {self.arms}.")
        for arm in self.arms:
            one_of("arms", arm, ARMS)
        if self.block_size < 1:
            raise ConfigError(f"block_size must be at least 1, but got {self.block_size}.")
        constant = [arm for arm in self.tuned_arms if TUNED[arm].lends or TUNED[arm].gated]
        if self.tuning.mean != "question" and (constant or self.centre):
            raise ConfigError(
                f"{constant[0] if constant else 'centre'} needs a constant shift, mean='question', "
                f"but got mean={self.tuning.mean!r}; leave it out."
            )

        if self.tuning.metrics == "published" and "answer_in_prompt" in self.arms:
            raise ConfigError(
                "the published metrics read the prompt, and that of answer_in_prompt holds the "
                "answer; leave the arm out."
            )

    @property
    def lends(self) -> bool:
        """Whether questions other than those that are run have to lend their deltas."""
        return self.centre or any(TUNED[arm].lends for arm in self.tuned_arms)

    @property
    def tuned_arms(self) -> list[str]:
        """The arms with a search."""
        return [arm for arm in self.arms if arm in TUNED]
