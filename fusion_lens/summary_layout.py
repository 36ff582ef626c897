"""What `summary.json` must hold for its tables to be made: declared, and checked when a run is
loaded.

Named is what is read by name somewhere; what else a summary says is left as it is.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NotRequired

from typing_extensions import TypedDict

from fusion_lens.decoding import GenerationConfig
from fusion_lens.prompts import Template
from fusion_lens.scores import LabelFigures
from fusion_lens.statistics import Comparison, Interval
from fusion_lens.typed_json import typed


class GroupMetrics(TypedDict):
    """Of an arm on the questions of one topic or answer type."""

    exact_match: Interval
    overlap: Interval
    objective: Interval


class Metrics(GroupMetrics):
    """Of an arm on all questions."""

    perplexity: Interval
    grade: Interval
    composite: Interval
    accurate: Interval
    transfer_exact_match: Interval
    neighbours_kept: Interval
    kl_unrelated: Interval


class Arm(TypedDict):
    """An arm's part; what is not required is of tuned ones."""

    n: int
    clusters: int
    labels: LabelFigures
    metrics: Metrics
    unscored: NotRequired[int]
    n_trials: NotRequired[list[int]]
    steered: NotRequired[int]
    coeffs_median: NotRequired[dict[str, float]]
    zero_won: NotRequired[float | None]
    tied: NotRequired[float]


class Judge(TypedDict):
    """What judged; what is not required is of judges that cost something."""

    name: str
    grade: bool
    requests: NotRequired[int]
    cached: NotRequired[int]
    tokens_in: NotRequired[int]
    tokens_out: NotRequired[int]
    cost: NotRequired[float | None]
    failures: NotRequired[dict[str, int]]


class Tuning(TypedDict):
    """Of the settings, how plans were tuned."""

    template: Template
    generation: GenerationConfig
    metrics: str


class Settings(TypedDict):
    """How the experiment was configured."""

    tuning: Tuning
    perplexity_model: str | None
    segments: NotRequired[str | int]


class Provenance(TypedDict):
    """What was run."""

    model: str
    settings: Settings


class Asked(TypedDict):
    """Which questions, of how many."""

    n: int
    available: NotRequired[int]
    file: NotRequired[str | None]
    split: NotRequired[str | None]


class Engine(TypedDict):
    """What the engine did."""

    rows: dict[str, int]
    halvings: int
    reasons: list[str]


class Share(TypedDict):
    """How much of the deltas is generic."""

    median: float | None
    n: int


class Donors(TypedDict):
    """How many questions lent to others."""

    n: int
    mismatched: int
    sharing_a_word: int


class Failed(TypedDict):
    """A question that could not be run, or an arm of it."""

    question_id: str
    arm: str | None
    error: str
    message: str


class Layout(TypedDict):
    """The whole summary."""

    schema_version: int
    provenance: Provenance
    questions: Asked
    arms: dict[str, Arm]
    comparisons: list[Comparison]
    groups: dict[str, dict[str, dict[str, GroupMetrics]]]
    failures: list[Failed]
    generic_share: Share
    donors: Donors
    judge: Judge
    unrelated_tokens: int
    engine: Engine
    interrupted: bool
    seconds: float


_SEARCHED = ("coeffs_median", "n_trials", "steered", "zero_won", "tied")
_COUNTED = ("requests", "cached", "tokens_in", "tokens_out", "cost", "failures")


def require_layout(summary: Any) -> None:
    """Make sure that a summary holds what its tables are made of.

    Raises:
        ValueError: if something is missing or of another type; names it.
    """
    layout: Layout = typed(Layout, summary)
    shape = summary["provenance"]["settings"]["tuning"]["generation"]
    _require_all("provenance.settings.tuning.generation", shape, ("slots", "cache_length"))
    for n, comparison in enumerate(summary["comparisons"]):
        names = tuple(field.name for field in fields(Comparison))
        _require_all(f"comparisons[{n}]", comparison, names)
    for name, arm in layout["arms"].items():
        _require_whole(f"arms.{name}", arm, _SEARCHED)
        for metric, interval in arm["metrics"].items():
            _require_interval(f"arms.{name}.metrics.{metric}", interval)
    _require_whole("judge", layout["judge"], _COUNTED)
    for field, groups in layout["groups"].items():
        for group, arms in groups.items():
            for name, metrics in arms.items():
                for metric, interval in metrics.items():
                    _require_interval(f"groups.{field}.{group}.{name}.{metric}", interval)
    share = layout["generic_share"]
    if share["n"] and share["median"] is None:
        raise ValueError("generic_share.median must be a number where n is not 0")
    _require_crossed(layout["comparisons"])


def _require_all(place: str, part: Any, names: tuple[str, ...]) -> None:
    """Also what has a default: the tables read what stands in the file."""
    for name in names:
        if name not in part:
            raise ValueError(f"{place}.{name} must be there, but is not")


def _require_whole(place: str, part: Any, names: tuple[str, ...]) -> None:
    there = [name for name in names if name in part]
    if there and len(there) < len(names):
        missing = next(name for name in names if name not in part)
        raise ValueError(f"{place} must have {missing} where it has {there[0]}")


def _require_interval(place: str, found: Any) -> None:
    if not isinstance(found, Interval):  # of a metric that no table names
        try:
            found = typed(Interval, found)
        except ValueError as error:
            raise ValueError(f"{place} must be an interval, but {error}") from error
    if (found.low is None) != (found.high is None):
        raise ValueError(f"{place} must have both ends or neither")


def _require_crossed(comparisons: list[Comparison]) -> None:
    pairs = {(each.b, each.metric) for each in comparisons}
    others, metrics = ({pair[i] for pair in pairs} for i in (0, 1))
    if len(pairs) != len(others) * len(metrics):
        raise ValueError("comparisons must be of every arm on every metric")
    for each in comparisons:
        if (each.low is None) != (each.high is None):
            raise ValueError(f"comparison with {each.b} on {each.metric} must have both ends")
