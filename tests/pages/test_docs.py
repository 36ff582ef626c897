"""The documentation is true: its code runs, it builds strictly and asks nothing of the network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from documents import (
    ROOT,
    blocks_of,
    in_this_process,
    parse,
    run_blocks,
    same_but_for_rounding,
)
from judge_server import says, serving

import fusion_lens

DOCS = ROOT / "docs"
PAGES = [DOCS / "tutorial.md", *sorted((DOCS / "how-to").glob("*.md"))]
REFERENCE = "".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
DOCUMENTED = re.findall(r"^::: (\S+)$", REFERENCE, re.MULTILINE)
EXPORTED = fusion_lens.__all__
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "fusion_lens").rglob("*.py")
)


@pytest.mark.pages
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_code_block_of_a_page_runs_in_order(page, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    # drawing with a browser takes longer than everything else; the README's commands do it
    monkeypatch.setattr("fusion_lens.pictures._CHROMIUM", ())
    text = page.read_text("utf-8")
    with serving({"Reply with the number": [says("4")]}) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.base_url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        ran = [block for block, _ in run_blocks(text, page.name, in_this_process)]
    runnable = [block for block in blocks_of(text) if block.kind in ("python", "sh")]
    assert ran == runnable
    assert bool(ran) == (page.stem != "index")


def test_what_is_shown_as_printed_is_compared() -> None:
    assert same_but_for_rounding("norm 15.11  \n", "norm 15.1\n")
    assert same_but_for_rounding("-0.00 a", "-0.00 a")
    assert not same_but_for_rounding("norm 16.1", "norm 15.1")
    assert not same_but_for_rounding("14 March 1872", "14 March 1873")
    assert not same_but_for_rounding("1.0 1.0", "1.0")
    page = "```python\nprint(2)\n```\n\n```text\n3\n```\n"
    with pytest.raises(AssertionError):
        list(run_blocks(page, "page", in_this_process))


def test_an_option_that_is_not_there_is_found() -> None:
    parse(["run", "--limit", "3"])
    with pytest.raises(Exception, match="No such option"):
        parse(["run", "--limits", "3"])


def test_every_module_is_on_one_reference_page() -> None:
    public = [module for module in MODULES if module != "fusion_lens"]
    assert sorted(DOCUMENTED) == public


def test_every_name_the_package_exports_is_on_a_reference_page() -> None:
    assert len(EXPORTED) >= 40
    for name in EXPORTED:
        value = getattr(fusion_lens, name)
        assert value.__module__ in DOCUMENTED
        assert value.__doc__, f"{name} is left out of the reference without a docstring"


def test_every_link_to_a_file_leads_somewhere_on_a_code_host_too() -> None:
    broken = []
    for page in DOCS.rglob("*.md"):
        for link in re.findall(r"\]\((?!\w+:)([^)\s#]+\.\w+)", page.read_text("utf-8")):
            if not (page.parent / link).exists():
                broken.append((page.name, link))
    assert broken == []


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built strictly: a warning is an error."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed (pip install 'fusion-lens[docs]')")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.pages
def test_the_site_loads_nothing_from_elsewhere(site) -> None:
    loaded = re.compile(
        r"<(?:script|link|img|iframe|source|use|object|embed)\b[^>]*?\b(?:src|srcset|href|data)="
        r"[\"']?((?:https?:)?//[^\"'\s>]+)"
    )
    fetched = {(p.name, url) for p in site.rglob("*.html") for url in loaded.findall(p.read_text())}
    assert fetched == set()
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//", styles) == []


@pytest.mark.pages
def test_every_exported_name_has_its_place_in_the_built_reference(site) -> None:
    pages = "".join(path.read_text() for path in (site / "reference").glob("*.html"))
    for name in EXPORTED:
        assert f'id="{getattr(fusion_lens, name).__module__}.{name}"' in pages


@pytest.mark.pages
def test_formulas_are_mathml_and_none_is_left_as_tex(site) -> None:
    method = (site / "method.html").read_text()
    assert method.count("<math") >= 10
    for page in site.rglob("*.html"):
        assert 'class="arithmatex"' not in page.read_text(), page.name


@pytest.mark.pages
def test_every_command_and_option_is_on_the_command_line_page(site) -> None:
    from typer.main import get_command

    from fusion_lens.cli import app

    page = (site / "command_line.html").read_text()
    for name, command in get_command(app).commands.items():
        assert f'id="{name}"' in page
        for parameter in command.params:
            if parameter.name != "help":
                assert all(
                    f"<code>{opt}" in page or opt.upper() in page for opt in parameter.opts
                ), (name, parameter.opts)


def test_every_extra_is_told_and_no_other() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    told = re.findall(
        r"^\| `(\w+)` \|", (DOCS / "how-to/install.md").read_text("utf-8"), re.MULTILINE
    )
    assert sorted(told) == sorted(project["optional-dependencies"])
