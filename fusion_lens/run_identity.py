"""What a run is, by content: a run goes on only as what it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.judges import Judge
from fusion_lens.questions import Question, questions_digest
from fusion_lens.workers import Description


def identity_of(
    has: Description,
    questions: Sequence[Question],
    pool: Sequence[Question],
    donors: Sequence[Question] | None,
    *,
    judge: Judge,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """All that the results of a run depend on. `donors` is None where no arm is lent anything;
    `settings` are those of `settings_of`, with what else the run was given."""
    return {
        "model": {**asdict(has.model), "name": None},
        "questions": [question.id for question in questions],
        "questions_sha256": questions_digest(questions),
        "pool_sha256": questions_digest(pool),
        "donors_sha256": None if donors is None else questions_digest(donors),
        "judge": {"name": judge.name, "grade": judge.grade},
        **has.content,
        "settings": _deciding(settings),
    }


def settings_of(config: ExperimentConfig, unrelated: str | None) -> dict[str, Any]:
    """A config for the record of a run, with a digest of the unrelated text it measures on."""
    settings = asdict(config)
    sampler = config.tuning.search.sampler
    settings["tuning"]["search"]["sampler"] = getattr(sampler, "__qualname__", "TPE")
    starts = settings["tuning"].pop("starts")
    if any(starts.values()):
        # thousands of questions may have starts of their own: held by a digest
        own = json.dumps(starts.pop("own")).encode()
        settings["tuning"]["starts"] = {"own_sha256": hashlib.sha256(own).hexdigest(), **starts}
    # a storage URL may hold a password
    settings["storage"] = config.storage is not None
    settings["unrelated"] = None if config.unrelated is None else config.unrelated.name
    settings["unrelated_sha256"] = (
        None if unrelated is None else hashlib.sha256(unrelated.encode()).hexdigest()
    )
    return settings


def _deciding(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that results depend on; files and models are held by their content."""
    others = ("block_size", "storage", "unrelated", "perplexity_model")
    return {name: own for name, own in settings.items() if name not in others}
