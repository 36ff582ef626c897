"""The lowest versions that pyproject.toml declares, as constraints for pip.

torch is left at the one of constraints.txt: of older ones pip finds no build for a CPU alone
without another index, and the others bring several GB of CUDA.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def lowest() -> list[str]:
    """One line for each dependency."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [re.sub(r">=([\w.]+).*", r"==\1", each) for each in project["dependencies"]]
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    torch = [pin for pin in pins if pin.startswith("torch==")]
    return torch + [line for line in lines if not line.startswith("torch==")]


if __name__ == "__main__":
    sys.stdout.write("\n".join(lowest()) + "\n")
