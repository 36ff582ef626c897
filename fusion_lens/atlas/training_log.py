"""Losses of steps -> lines of `training_log.jsonl`, and a progress line on the terminal."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from fusion_lens.errors import InputFileError
from fusion_lens.typed_json import parsed, typed


class _Record(TypedDict):
    step: int
    tokens: int
    seconds: float


class TrainingLog:
    """Collects steps and writes one line about them at every save.

    A run that goes on drops the lines written after the state it starts from. Figures cover the
    steps since the line before; `tokens` counts from the beginning, `seconds` is time at work.

    Raises:
        InputFileError: if a line of an earlier start is malformed; names it.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        kept = _read(path) if path.exists() else []
        self._records = [record for record in kept if record["step"] <= first_step]
        self._path = path
        self._step = first_step
        self._tokens: int = self._records[-1]["tokens"] if self._records else 0
        self._seconds: float = self._records[-1]["seconds"] if self._records else 0.0
        self._losses: list[float] = []
        self._since = time.monotonic()

    def add(self, loss: float, n_tokens: int) -> None:
        """Take in one step."""
        self._step += 1
        self._losses.append(loss)
        self._tokens += n_tokens
        seconds = (time.monotonic() - self._since) / len(self._losses)
        progress = f"\rstep {self._step}  loss {loss:.3f}  {seconds:.2f} s a step "
        print(progress, end="", file=sys.stderr, flush=True)

    def write(self, probes: dict[str, float]) -> None:
        """Write and print the line of the steps since the line before."""
        now = time.monotonic()
        self._seconds += now - self._since
        record = {
            "step": self._step,
            "tokens": self._tokens,
            "seconds": round(self._seconds, 1),
            "loss": round(sum(self._losses) / len(self._losses), 5),
            **probes,
        }
        self._since, self._losses = now, []
        self._records.append(record)
        text = "".join(json.dumps(each) + "\n" for each in self._records)
        self._path.write_text(text, encoding="utf-8")
        print("  ".join(f"{key} {value}" for key, value in record.items()), flush=True)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputFileError(path, f"must be readable: {error.strerror}") from error
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append({**typed(_Record, parsed(line))})
        except ValueError as error:
            reason = f"must be a line of a training log: {error}"
            raise InputFileError(path, reason, number) from error
    return records
