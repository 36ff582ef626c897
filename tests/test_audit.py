from __future__ import annotations

from typing import Any

import pytest
from audit import PINS, told

KNOWN = {"id": "PYSEC-1", "fix_versions": ["2.0"]}


def package(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "version": "1.0", **more}


def test_a_known_vulnerability_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    packages = [package("a", vulns=[KNOWN]), package("b", vulns=[])]
    assert told({"dependencies": packages}, "") == 1
    assert capsys.readouterr().out == (
        "a 1.0: PYSEC-1, fixed in 2.0\n2 packages audited, 0 not; 1 known vulnerabilities\n"
    )


def test_none_ends_with_0_and_says_what_was_looked_up(capsys: pytest.CaptureFixture[str]) -> None:
    packages = [package("a", vulns=[]), {"name": "b", "skip_reason": "not on PyPI"}]
    assert told({"dependencies": packages}, "") == 0
    assert capsys.readouterr().out == (
        "b: not on PyPI\n1 packages audited, 1 not; 0 known vulnerabilities\n"
    )


@pytest.mark.parametrize(
    ("content", "errors", "message", "code"),
    [
        (None, "requests.exceptions.ConnectionError: no route", "cannot be reached", 0),
        (None, "Failed to resolve 'pypi.org'", "cannot be reached", 0),
        (
            {"dependencies": [{"name": "a", "skip_reason": "not found"}]},
            "",
            "not audited: the service knows none of the 1 packages",
            0,
        ),
        (None, "ERROR: requirements are malformed", "pip-audit failed: ERROR: requirements", 1),
    ],
)
def test_what_could_not_be_looked_up_is_said(
    content: Any, errors: str, message: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(content, errors) == code
    assert message in capsys.readouterr().out


def test_every_pin_is_an_exact_version() -> None:
    lines = [line for line in PINS.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) > 50
    assert [line for line in lines if "==" not in line or ">" in line] == []
