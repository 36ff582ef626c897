"""The pinned dependencies against known vulnerabilities, with pip-audit: `python tests/audit.py`.

Ends with 1 if there is one. Where the service cannot be reached, or knows none of the packages (a
mirror in its place), it says so and ends with 0: nothing was found, and nothing was looked up.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PINS = Path(__file__).parents[1] / "constraints.txt"
_SECONDS = 300
_UNREACHABLE = ("ConnectionError", "Connection", "resolve", "Timeout", "timed out", "ServiceError")


def main() -> int:
    try:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip_audit", "--requirement", str(PINS)),
                # every package is pinned: nothing is resolved, built or installed
                *("--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"),
            ],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        print(f"not audited: the service did not answer within {_SECONDS} s")
        return 0
    try:
        content = json.loads(done.stdout)
    except ValueError:
        content = None
    return told(content, done.stderr)


def told(content: Any, errors: str) -> int:
    """Print what pip-audit says, and give the exit code; `content` is None where it broke off."""
    if content is None:
        reason = (errors.strip().splitlines() or ["no reason given"])[-1]
        if any(each in errors for each in _UNREACHABLE):
            print(f"not audited: the service cannot be reached ({reason[:200]})")
            return 0
        print(f"pip-audit failed: {reason}")
        return 1
    packages = content["dependencies"]
    skipped = [each for each in packages if "skip_reason" in each]
    audited = len(packages) - len(skipped)
    if not audited:
        print(f"not audited: the service knows none of the {len(packages)} packages")
        return 0
    found = [(each, known) for each in packages for known in each.get("vulns", [])]
    for each, known in found:
        fixed = ", ".join(known["fix_versions"]) or "no version"
        print(f"{each['name']} {each['version']}: {known['id']}, fixed in {fixed}")
    for each in skipped:
        print(f"{each['name']}: {each['skip_reason']}")
    print(f"{audited} packages audited, {len(skipped)} not; {len(found)} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
