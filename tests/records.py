"""Records and summaries of a run, made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fusion_lens.deltas import Deltas
from fusion_lens.details import DETAILS, Detail, FeatureShare, Marked, Trace
from fusion_lens.identity import ModelIdentity
from fusion_lens.json_lines import replace_lines
from fusion_lens.prompts import Layout, Template
from fusion_lens.results import (
    RESULTS,
    SCHEMA_VERSION,
    Result,
    Results,
    Summary,
    save_summary,
)
from fusion_lens.scores import label_figures
from fusion_lens.search import Coeffs, Search, SearchConfig, Tuned
from fusion_lens.statistics import Comparison, Interval

LOVELACE = Result(
    question_id="lovelace",
    arm="baseline",
    subject="Ada Lovelace",
    topic="Books",
    answer_type="Person",
    question="Who wrote the red book?",
    answer="Ada Lovelace",
    explanation="It says so.",
    completion="Tom Harris. He wrote it.",
    extracted="Tom Harris.",
    ended=True,
    finite=True,
    margin=0.25,
    coeffs={},
    injected_norm=0.0,
    objective=-0.06,
    overlap=0.0,
    exact_match=0.0,
    contained_match=0.0,
    token_f1=0.0,
    nll=3.0,
    perplexity=20.0,
    distinct_2=1.0,
    repetition=0.0,
    transfer_exact_match=0.0,
    transfer_n=5,
    neighbours_kept=1.0,
    neighbours_n=3,
    kl_unrelated=0.0,
    label="INCORRECT",
    grade=None,
    composite=None,
    judged="another answer",
    n_trials=1,
    best_trial=1,
    zero_won=None,
    tied=None,
    donor=None,
    n_not_finite=0,
    seconds=0.5,
)


LABELS = asdict(label_figures([*["CORRECT"] * 3, *["INCORRECT"] * 6, "NOT_ATTEMPTED", None, None]))


def tuned(question_id: str, early: float, late: float, **more: object) -> Result:
    coeffs = {"early": early, "late": late}
    made = replace(LOVELACE, question_id=question_id, arm="segmented", coeffs=coeffs)
    return replace(made, **{"zero_won": False, "tied": False, "n_trials": 30, **more})


def interval(mean: float | None, low: float | None, high: float | None, unscored: int = 0) -> Any:
    return asdict(Interval(mean, low, high, n=12 - unscored, unscored=unscored, clusters=6))


def arm(**metrics: dict[str, Any]) -> dict[str, Any]:
    shown = {
        "exact_match": interval(0.25, 0.0, 0.5),
        "grade": interval(2.5, 2.0, 3.0),
        "composite": interval(0.5, 0.25, 0.75),
        "accurate": interval(0.125, 0.0, 0.25),
        "overlap": interval(0.5, 0.25, 0.75),
        "objective": interval(0.3125, -0.0625, 0.5),
        "nll": interval(1.0, 0.5, 2.0),
        "perplexity": interval(12.3, 4.5, 67.8),
        "distinct_2": interval(1.0, 1.0, 1.0),
        "transfer_exact_match": interval(0.125, 0.0, 0.25),
        "neighbours_kept": interval(0.75, 0.5, 1.0),
        "kl_unrelated": interval(0.0625, 0.03125, 0.125),
    }
    return {"n": 12, "unscored": 0, "labels": LABELS, "clusters": 6, "metrics": shown | metrics}


def deltas(vectors: Any, base: Any) -> Deltas:
    """Those of a question whose `vectors` are these."""
    change, mu = torch.as_tensor(vectors), torch.as_tensor(base)
    shape = (change.shape[0], change.shape[1])
    model = ModelIdentity("made", "bridge", "unprocessed", *shape, "float32", "w", "e")
    return Deltas(reference=mu + change, base=mu, layout=Layout(3, ()), model=model)


@dataclass(frozen=True)
class Toy:
    """What a search has to know of a trial."""

    objective: float
    overlap: float | None = 0.5
    perplexity: float | None = 20.0


def searched(score: Callable[[Coeffs], Toy], segments: Sequence[str], **options: Any) -> Tuned[Toy]:
    """One search from its first round to its last; the norm is the sum of the coefficients."""
    search: Search[Toy] = Search(
        segments, SearchConfig(**options), lambda coeffs: sum(coeffs.values())
    )
    while not search.done:
        search.tell([score(coeffs) for coeffs in search.ask()])
    return search.result()


def comparison(b: str, metric: str, diff: float | None, **more: object) -> dict[str, Any]:
    """The method's arm minus `b`, as in a summary."""
    ends = (None, None) if diff is None else (diff - 0.25, diff + 0.125)
    made = Comparison("segmented", b, metric, 12, 0, 6, diff, *ends, p=0.01, p_holm=0.02)
    return asdict(replace(made, **more))


def summary(**arms: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "provenance": {
            "model": "tiny",
            "settings": {
                "tuning": {
                    "template": asdict(Template()),
                    "generation": {"slots": 64, "cache_length": 96},
                    "metrics": "completion",
                },
                "perplexity_model": None,
            },
        },
        "questions": {"n": 12, "available": 12},
        "arms": arms,
        "failures": [],
        "engine": {"rows": {"lean": 372, "hooks": 0}, "reasons": [], "halvings": 0},
        "interrupted": False,
        "comparisons": [],
        "groups": {},
        "generic_share": {"median": 0.4375, "n": 2},
        "donors": {"n": 12, "mismatched": 11, "sharing_a_word": 2},
        "judge": {"name": "lexical", "grade": False},
        "unrelated_tokens": 2000,
        "seconds": 1.5,
    }


def detail(question_id: str, norms: tuple[float, ...], **more: object) -> Detail:
    made = Detail(
        question_id=question_id,
        delta_norms=norms,
        base_norms=tuple(2 * norm for norm in norms),
        generic_share=(0.5,) * len(norms),
        captured=Marked(("<s>", "Who", "?", "\n", "Ada", " Lovelace"), (4, 5)),
        steered=Marked(("<s>", "Who", "?"), (1, 2)),
        traces=(
            Trace("segmented", ("Ada", " <b>", "</s>"), (-0.5, -1.0, -0.25), (-4.5, -0.5, -0.25)),
        ),
        features=(FeatureShare(1, 7, 2.5, 0.125, "a <name>"),),
        features_of="segmented",
    )
    return replace(made, **more)


def saved(folder: Path, results: Results | None = None) -> Path:
    """A run's files, as it leaves them."""
    results = results or make_results()
    (folder / "plans").mkdir(parents=True, exist_ok=True)
    replace_lines(folder / RESULTS, results.records)
    replace_lines(folder / DETAILS, results.details)
    save_summary(folder, results.summary)
    return folder


def make_results() -> Results:
    arms = {
        "baseline": arm(exact_match=interval(0.0, 0.0, 0.0)),
        "segmented": arm()
        | {
            "n_trials": [30, 30],
            "steered": 1,
            "coeffs_median": {"early": 1.5, "late": 0.5},
            "zero_won": 0.5,
            "tied": 0.0,
            "not_finite": 0,
        },
    }
    records = (
        LOVELACE,
        tuned("lovelace", 1.5, 0.5),
        replace(LOVELACE, question_id="harris", subject="Tom Harris"),
        tuned("harris", 0.0, 0.0, zero_won=True),
    )
    details = (detail("lovelace", (1.0, 2.0)), detail("harris", (3.0, 5.0)))
    return Results(records, Summary(summary(**arms)), details)
