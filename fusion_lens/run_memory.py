"""Where what a run makes goes that has no folder: it is kept here, and gone with the run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusion_lens.details import Detail
from fusion_lens.preparation import Failure
from fusion_lens.results import Result
from fusion_lens.run_folder import Made


class RunMemory:
    """Of a run without a folder."""

    def __init__(self) -> None:
        self.done: set[tuple[str, str]] = set()
        self.detailed: set[str] = set()
        self.lent: dict[str, int] = {}
        self.resumed = False
        self.run = ""
        self._records: list[Result] = []
        self._details: list[Detail] = []
        self._failures: list[Failure] = []

    def add(self, made: Made) -> None:
        self._records += made.records
        self._details += made.details
        self._failures += made.failures

    def keep_lent(self, lent: Mapping[str, int]) -> None:
        self.lent = dict(lent)

    def records(self) -> list[Result]:
        return self._records

    def details(self) -> tuple[Detail, ...]:
        return tuple(self._details)

    def failures(self) -> list[Failure]:
        return self._failures

    def finish(self, summary: Mapping[str, Any], order: Mapping[tuple[str, str], int]) -> None:
        self._records.sort(key=lambda own: order[own.question_id, own.arm])
        names = list(dict.fromkeys(name for name, _ in order))
        self._details.sort(key=lambda own: names.index(own.question_id))
