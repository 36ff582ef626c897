"""Remake the README's figures and tables from a finished run: `make figures`.

Each picture lies beside the rows it shows. The blocks of README.md between `<!-- name -->` and
`<!-- end -->` are rewritten from the same files, so that text and data cannot drift apart.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

from fusion_lens.pictures import write_figures
from fusion_lens.plots import run_figures
from fusion_lens.report import lender_lines, sections, tuned_lines
from fusion_lens.results import load_results

FIGURES = Path(__file__).parent
README = FIGURES.parent / "README.md"
PROBES = FIGURES.parent / "fusion_lens" / "atlas" / "probes.json"


def readme_blocks(summary: dict[str, object], probes: dict[str, object]) -> dict[str, str]:
    """The generated blocks of the README by name."""
    tables = [f"**{part.title}**\n\n{part.to_markdown()}" for part in sections(summary)]
    lines = [f"- {line}" for line in (*tuned_lines(summary), *lender_lines(summary))]
    return {
        "results": "\n\n".join([*tables, "\n".join(lines)]),
        "probes": probe_table(probes),
    }


def probe_table(probes: dict[str, object]) -> str:
    """The probes of `probes.json` as Markdown."""
    rows = [
        f"| {name} | {share['share']:.1%} "
        f"| {share['interval'][0]:.1%} to {share['interval'][1]:.1%} "
        f"| {share['hits']} / {share['n']} |"
        for name, share in probes["probes"].items()
    ]
    return "\n".join(
        ["| probe | share | 95 % (Wilson) | hits / n |", "| --- | ---: | ---: | ---: |", *rows]
    )


def with_blocks(readme: str, blocks: dict[str, str]) -> str:
    """`readme` with every generated block replaced."""
    for name, text in blocks.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        readme, count = pattern.subn(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", readme)
        assert count == 1, name
    return readme


def main() -> None:
    """Read the run named on the command line; write pictures, data and the README's blocks."""
    run = Path(sys.argv[1])
    results = load_results(run)
    reason = write_figures(run_figures(results), FIGURES, html=False, data=True)
    if reason is not None:
        sys.exit(reason)
    shutil.copy(run / "summary.json", FIGURES / "summary.json")
    probes = json.loads(PROBES.read_text(encoding="utf-8"))
    blocks = readme_blocks(results.summary, probes)
    README.write_text(with_blocks(README.read_text(encoding="utf-8"), blocks), encoding="utf-8")


if __name__ == "__main__":
    main()
