"""A few questions -> which segments of layers, how strongly, do something on this model.

Every segment alone, and all of them together, is tried at every strength on every question, as rows
of one batch beside the zero plan. The gain of a cell is the mean over questions of objective minus
the zero plan's objective, with a cluster bootstrap over subjects. The best strength of each row of
cells becomes a start of the preset, the largest gain first. It is the best of several, so that its
own gain flatters: what a preset is worth is seen on other questions. A start costs a trial, so that
there are at most four, and none that gains less than 0.01.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fusion_lens.errors import ConfigError, SearchError
from fusion_lens.generation import generate
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.preparation import Failure, TuningConfig, prepare, with_engine_shape
from fusion_lens.presets import Preset, text_digest
from fusion_lens.progress import Progress, shown
from fusion_lens.questions import Question
from fusion_lens.results import running_versions
from fusion_lens.scoring import Scorer
from fusion_lens.search import Coeffs
from fusion_lens.segments import Segment
from fusion_lens.statistics import Interval, cluster_bootstrap
from fusion_lens.tables import Section, Shows
from fusion_lens.tuning import Job, make_segments

STRENGTHS = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
TOGETHER = "all"
"""The name of the row in which every segment has the same coefficient."""

_MOST_STARTS = 4
_LEAST_GAIN = 0.01


@dataclass(frozen=True, slots=True)
class Cell:
    """One coefficient for one segment, or for all of them, and the gain it brings in objective."""

    segment: str
    coeff: float
    gain: Interval


@dataclass(frozen=True, slots=True)
class Suggestion(Shows):
    """A sweep: its preset, its cells, row by row in ascending coefficients, and the questions that
    could not be prepared."""

    preset: Preset
    cells: tuple[Cell, ...]
    failures: tuple[Failure, ...] = ()

    @property
    def best(self) -> tuple[Cell, ...]:
        """The cell of the largest mean gain in every row; of equal ones that of the smaller
        coefficient."""
        return best_of_rows(self.cells)

    def table(self) -> Section:
        """The best coefficient of every row of cells."""
        rows = tuple(
            (cell.segment, f"{cell.coeff:g}", f"{_mean(cell):+.3f}", _shown(cell.gain))
            for cell in self.best
        )
        n, n_cells = len(self.preset.questions), len(self.cells)
        title = f"the best of {n_cells} cells on {n} questions of {self.preset.model.name}"
        notes = [f"each gain is that of the best of {n_cells // len(rows)} strengths: it flatters"]
        notes += [f"failed: {own.question_id}: {own.message}" for own in self.failures]
        header = ("segment", "coefficient", "mean gain in objective", "95 %")
        return Section(title, header, rows, tuple(notes))


def suggest(
    model: HookedModel,
    questions: Sequence[Question],
    *,
    segments: str | int | Sequence[Segment] = "thirds",
    strengths: Sequence[float | int] = STRENGTHS,
    config: TuningConfig | None = None,
    fluency: PerplexityModel | None = None,
    progress: Progress | bool = True,
) -> Suggestion:
    """Sweep the strengths of every segment over a few questions, which are not to be reported.

    `segments`, `fluency` and `progress` are as in `tune`. A question that cannot be prepared is
    left out.

    Raises:
        ConfigError: if there is no question or strength, or one is not above 0.
        PlanError: if the model has fewer layers than segments.
        SearchError: if no question can be prepared.
    """
    config = config or TuningConfig()
    parts = make_segments(segments, int(model.cfg.n_layers))
    strengths = _ascending(strengths)
    if not questions:
        raise ConfigError("there must be at least one question to try strengths on, but got none.")
    names = [segment.name for segment in parts]
    rows: dict[str, tuple[str, ...]] = {name: (name,) for name in names}
    if len(parts) > 1:
        rows[TOGETHER] = tuple(names)
    grid = [(row, coeff) for row in rows for coeff in strengths]
    zero = dict.fromkeys(names, 0.0)
    tried = [zero, *(zero | dict.fromkeys(rows[row], coeff) for row, coeff in grid)]
    shaped = with_engine_shape(model, questions, config, n_rows=len(questions) * len(tried))
    prepared, failures = prepare(model, questions, shaped)
    if not prepared:
        raise SearchError(
            f"at least one question must be fit to be steered, but: {failures[0].message}"
        )
    score = Scorer(model, shaped, fluency=fluency)
    jobs = [Job(item, parts, "sweep") for item in prepared]
    with shown(progress) as show:
        gains = _gains(model, jobs, tried, score, shaped, show)
    subjects = [item.question.subject or item.question.id for item in prepared]
    cells = tuple(
        Cell(row, coeff, cluster_bootstrap(own, subjects, seed=config.search.seed))
        for (row, coeff), own in zip(grid, gains, strict=True)
    )
    found = {cell: _mean(cell) for cell in best_of_rows(cells)}
    able = [cell for cell in found if found[cell] >= _LEAST_GAIN]
    good = sorted(able, key=lambda cell: -found[cell])[:_MOST_STARTS]
    preset = Preset(
        model=identify(model),
        segments=parts,
        starts=tuple(
            tuple(cell.coeff if name in rows[cell.segment] else 0.0 for name in names)
            for cell in good
        ),
        gains=tuple(found[cell] for cell in good),
        weight=config.search.weight,
        questions=tuple(text_digest(item.question.question) for item in prepared),
        versions=running_versions(),
    )
    return Suggestion(preset, cells, tuple(failures))


def best_of_rows(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Of every segment's cells the one of the largest mean gain; of equal ones that of the smallest
    coefficient."""
    rows: dict[str, list[Cell]] = {}
    for cell in cells:
        rows.setdefault(cell.segment, []).append(cell)
    return tuple(min(row, key=lambda cell: (-_mean(cell), cell.coeff)) for row in rows.values())


def _gains(
    model: HookedModel,
    jobs: Sequence[Job],
    tried: Sequence[Coeffs],
    score: Scorer,
    config: TuningConfig,
    progress: Progress | None,
) -> list[list[float]]:
    """Of all that is tried but the first, the gain over the first on every question."""
    pairs = [(job, coeffs) for coeffs in tried for job in jobs]
    rows = [job.prepared.row(config, job.plan(coeffs, config)) for job, coeffs in pairs]
    told = None if progress is None else lambda done: progress("sweep", done, len(rows))
    written = generate(model, rows, config.generation, progress=told)
    graded = score([job.prepared for job, _ in pairs], written)
    objectives = [own.objective for own in graded]
    lines = [objectives[n : n + len(jobs)] for n in range(0, len(objectives), len(jobs))]
    return [[one - zero for one, zero in zip(own, lines[0], strict=True)] for own in lines[1:]]


def _ascending(strengths: Sequence[float | int]) -> tuple[float, ...]:
    if not strengths or not all(0.0 < strength < math.inf for strength in strengths):
        raise ConfigError(
            f"strengths must be above 0 and at least one, but got {tuple(strengths)}."
        )
    return tuple(sorted({float(strength) for strength in strengths}))


def _mean(cell: Cell) -> float:
    assert cell.gain.mean is not None
    return cell.gain.mean


def _shown(gain: Interval) -> str:
    """An interval; none of a single subject."""
    if gain.low is None or gain.high is None:
        return "-"
    return f"[{gain.low:+.3f}, {gain.high:+.3f}]"
