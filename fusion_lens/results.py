"""Records of a run that ended, on disk: `results.jsonl`, `details.jsonl`, `summary.json`,
`plans/*.safetensors`; versioned. How they come to be there: `run_folder`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion_lens.details import Detail, load_details
from fusion_lens.durable import replace_text
from fusion_lens.errors import InputFileError, MissingExtraError
from fusion_lens.identity import ModelIdentity
from fusion_lens.json_lines import read_lines
from fusion_lens.report import sections
from fusion_lens.scores import ACCURATE
from fusion_lens.summary_layout import require_layout
from fusion_lens.typed_json import parsed, typed

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Group

SCHEMA_VERSION = 7
RESULTS = "results.jsonl"
SUMMARY = "summary.json"
_PACKAGES = ("fusion-lens", "torch", "transformer-lens", "transformers", "optuna")


@dataclass(frozen=True, slots=True)
class Result:
    """One question under one arm.

    `explanation` is the one in the reference text. Not `finite`: the logits of the completion held
    NaN or infinity; `n_not_finite` of the trials' did. `margin` is the smallest gap between the two
    highest logits of a greedy step: another slot shape flips a token only where it is tiny.
    `coeffs` by segment name (empty where nothing was tuned), `extra` what was sought beside them;
    `nll` in nats per token, `perplexity`
    its exponential; `seconds` the arm's share of the wall time, by rows; `zero_won` and `tied` as
    in `search.Tuned`; the transfer fields as in `transfer.Reach`; `label` and `grade` are the
    judge's, `judged` what it says of them, `composite` half overlap and half grade; `donor` is the
    question whose deltas a mismatched arm used. None is unscored.
    """

    question_id: str
    arm: str
    subject: str
    topic: str | None
    answer_type: str | None
    question: str
    answer: str
    explanation: str
    completion: str
    extracted: str
    ended: bool
    finite: bool
    margin: float | None
    coeffs: dict[str, float]
    injected_norm: float
    objective: float
    overlap: float | None
    exact_match: float
    contained_match: float
    token_f1: float | None
    nll: float | None
    perplexity: float | None
    distinct_2: float | None
    repetition: float | None
    transfer_exact_match: float | None
    transfer_n: int
    neighbours_kept: float | None
    neighbours_n: int
    kl_unrelated: float | None
    label: str | None
    grade: float | None
    composite: float | None
    judged: str
    n_trials: int
    best_trial: int
    zero_won: bool | None
    tied: bool | None
    donor: str | None
    n_not_finite: int
    seconds: float
    extra: dict[str, float | int] = field(default_factory=dict)

    @property
    def correct(self) -> float | None:
        """1 where the judge says CORRECT, 0 where it says anything else."""
        return None if self.label is None else float(self.label == "CORRECT")

    @property
    def accurate(self) -> float | None:
        """1 where the composite reaches what Fusion Steering calls accurate."""
        return None if self.composite is None else float(self.composite >= ACCURATE)


def running_versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


@dataclass(frozen=True, slots=True)
class Provenance:
    """What was run, on what, with what; `command` as it was typed, but for the storage's URL; None
    where nothing was."""

    command: str | None
    model: str
    weights_sha256: str
    processing_mode: str
    dtype: str
    seed: int
    questions_sha256: str
    settings: dict[str, Any]
    versions: dict[str, str]
    threads: int

    @staticmethod
    def of(
        model: ModelIdentity,
        *,
        command: str | None,
        seed: int,
        questions_sha256: str,
        settings: dict[str, Any],
        threads: int,
    ) -> Provenance:
        """Gather the versions of the running environment."""
        return Provenance(
            command=command,
            model=model.name,
            weights_sha256=model.weights,
            processing_mode=model.processing,
            dtype=model.dtype,
            seed=seed,
            questions_sha256=questions_sha256,
            settings=settings,
            versions=running_versions(),
            threads=threads,
        )


class Summary(dict[str, Any]):
    """What `summary.json` holds: the dictionary as it is, which can be made a table, and which
    shows its tables in Jupyter."""

    def _repr_html_(self) -> str:
        return "".join(section.to_html() for section in sections(self))

    def __rich__(self) -> Group:
        from rich.console import Group

        return Group(*(section.to_rich() for section in sections(self, between="\n")))

    def to_pandas(self) -> pd.DataFrame:
        """A row per arm and metric over all questions (`by` "all"), and per topic and answer type:
        mean, interval, n, unscored and clusters.

        Raises:
            MissingExtraError: if pandas is not installed.
        """
        groups = [("all", "", {arm: own["metrics"] for arm, own in self["arms"].items()})]
        groups += [
            (by, value, arms) for by, own in self["groups"].items() for value, arms in own.items()
        ]
        rows = [
            {"by": by, "value": value, "arm": arm, "metric": metric, **interval}
            for by, value, arms in groups
            for arm, metrics in arms.items()
            for metric, interval in metrics.items()
        ]
        return _frame(rows)


@dataclass(frozen=True, slots=True)
class Results:
    """The records of a run, its summary, and what else it kept of every question."""

    records: tuple[Result, ...]
    summary: Summary
    details: tuple[Detail, ...] = ()

    def _repr_html_(self) -> str:
        return self.summary._repr_html_()

    def __rich__(self) -> Group:
        return self.summary.__rich__()

    def to_pandas(self) -> pd.DataFrame:
        """A row per question and arm, a column `coeff.<segment>` per coefficient, and one for what
        else was sought.

        Raises:
            MissingExtraError: if pandas is not installed.
        """
        rows = []
        for record in self.records:
            row = asdict(record)
            coeffs, extra = row.pop("coeffs"), row.pop("extra")
            rows.append(row | {f"coeff.{name}": value for name, value in coeffs.items()} | extra)
        return _frame(rows)


def _frame(rows: list[dict[str, Any]]) -> pd.DataFrame:
    try:
        import pandas as pd
    except ImportError as error:
        raise MissingExtraError("pandas", "pandas") from error
    return pd.DataFrame(rows)


def save_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write `summary.json`, whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    replace_text(folder / SUMMARY, text + "\n")


def plan_path(folder: Path, question_id: str, arm: str) -> Path:
    """Where a question's plan of one arm lies; ids and arms are made safe for a file name."""
    return folder / "plans" / f"{_file_name(question_id)}.{_file_name(arm)}.safetensors"


def _file_name(text: str) -> str:
    safe = re.sub(r"[^\w.-]", "_", text).lstrip(".")[:50]
    if safe != text:  # "a/b" and "a_b" must not share a file
        safe += f"-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return safe


def load_results(folder: str | Path) -> Results:
    """Read a run.

    Raises:
        InputFileError: if a file is missing, malformed or of another schema; names the line.
    """
    path = Path(folder) / SUMMARY
    text = _text(path)
    try:
        summary = parsed(text)
    except ValueError as error:
        raise InputFileError(path, f"must be JSON: {error}") from error
    if not isinstance(summary, dict) or summary.get("schema_version") != SCHEMA_VERSION:
        raise InputFileError(path, f"schema_version must be {SCHEMA_VERSION}")
    try:
        require_layout(summary)
    except ValueError as error:
        raise InputFileError(path, f"must be the summary of a run: {error}") from error
    folder = Path(folder)
    return Results(load_records(folder / RESULTS), Summary(summary), load_details(folder))


def load_records(path: Path) -> tuple[Result, ...]:
    """The lines of a `results.jsonl`.

    Raises:
        InputFileError: if it is missing or malformed; names the line.
    """
    return read_lines(path, read_result, noun="a result")


def read_result(content: Any) -> Result:
    """That of a line; refuses what is malformed with ValueError."""
    return typed(Result, content)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputFileError(
            path.parent, f"must hold the summary.json of a run that ended: {error.strerror}"
        ) from error
    except UnicodeDecodeError as error:
        raise InputFileError(path, f"must be UTF-8 text: {error.reason}") from error
