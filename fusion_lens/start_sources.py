"""The names of what searches are to start from -> starts, checked against model and questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion_lens.gradient_starts import LENGTHS
from fusion_lens.identity import ModelIdentity
from fusion_lens.preset_files import load_preset
from fusion_lens.presets import preset_starts
from fusion_lens.questions import Question
from fusion_lens.similar_starts import similar_starts
from fusion_lens.starts import Starts


@dataclass(frozen=True, slots=True)
class StartSources:
    """A file of a `preset`, the folder of a finished `run` of other questions, and whether to start
    along the `gradient` too."""

    preset: Path | None = None
    run: Path | None = None
    gradient: bool = False

    def starts(self, model: ModelIdentity, questions: Sequence[Question]) -> Starts:
        """Where the searches of these questions start on a model.

        Raises:
            InputFileError: if the preset, or a file of the run, cannot be read or is damaged.
            SearchError: if the preset is of another model, one of the questions was used for the
                preset or in the run, or the run is not finished.
            ConfigError: if the run has no segmented arm.
            PlanError: if the run is of another model, or a plan of it is missing or damaged.
        """
        return Starts(
            own=() if self.run is None else similar_starts(self.run, model, questions),
            shared=(
                ()
                if self.preset is None
                else preset_starts(load_preset(self.preset), model, questions)
            ),
            lengths=LENGTHS if self.gradient else (),
        )
