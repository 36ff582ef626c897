"""The wheel in a clean environment, with no extra and with all of them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path
from statistics import median

import pytest

pytestmark = pytest.mark.package

ROOT = Path(__file__).parents[2]
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
EXTRAS = {
    "pandas": "pandas",
    "sae": "sae_lens",
    "paper": "nltk",
    "bitsandbytes": "bitsandbytes",
    "judge": "inspect_ai",
    "neuronpedia": "neuronpedia",
    "ray": "ray",
    "png": "kaleido",
    "notebook": "ipywidgets",
}
"""One package of each extra."""


def done(*command: str | Path, cwd: Path, expected: int = 0) -> str:
    """What a command prints, none of this checkout on its path."""
    environment = {name: own for name, own in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment | {"COLUMNS": "100"},
    )
    assert ended.returncode == expected, ended.stderr + ended.stdout
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done(sys.executable, *PIP, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def home(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and no extra."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "venv", with_pip=True)
    pins = ("-c", ROOT / "constraints.txt")
    done(folder / "venv/bin/python", *PIP, "install", *pins, "torch", cwd=folder)
    done(folder / "venv/bin/python", *PIP, "install", *pins, wheel, cwd=folder)
    return folder


def test_the_wheel_is_small_and_has_types_and_data_and_no_test(wheel: Path) -> None:
    assert wheel.stat().st_size < 25e6
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "fusion_lens").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == expected
    assert {"fusion_lens/py.typed", "fusion_lens/__init__.pyi"} <= shipped
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_command_says_its_version_and_its_help_at_once(home: Path) -> None:
    program = home / "venv/bin/fusion-lens"
    assert done(program, "--version", cwd=home) == "fusion-lens 0.1.0\n"
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        told = done(program, "--help", cwd=home)
        seconds.append(time.perf_counter() - began)
    assert "tune" in told
    assert median(seconds) < 1.5


def test_a_shell_completes_commands_and_options(home: Path) -> None:
    def completed(words: str, place: int) -> list[str]:
        ended = subprocess.run(
            [home / "venv/bin/fusion-lens"],
            capture_output=True,
            text=True,
            env={
                "PATH": os.environ["PATH"],
                "_FUSION_LENS_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(place),
            },
        )
        return ended.stdout.split()

    assert completed("fusion-lens tun", 1) == ["tune"]
    assert completed("fusion-lens tune --max", 2) == ["--max-new-tokens"]


def test_a_question_is_tuned_with_no_extra(home: Path) -> None:
    told = done(
        home / "venv/bin/fusion-lens",
        *("tune", "When was Bren Aldack born?", "--answer", "14 March 1872"),
        *("--trials", "3", "--max-new-tokens", "8", "--explanation-tokens", "8"),
        *("--device", "cpu", "--out", "plan.safetensors"),
        cwd=home,
    )
    assert "plan saved to plan.safetensors" in told
    code = "import fusion_lens as f; p = f.load_plan('plan.safetensors'); print(p.model.name)"
    assert done(home / "venv/bin/python", "-c", code, cwd=home) == "atlas\n"
    assert "site-packages" in done(
        home / "venv/bin/python", "-c", "import fusion_lens; print(fusion_lens.__file__)", cwd=home
    )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("--load-in-8bit",), "pip install 'fusion-lens[bitsandbytes]'"),
        (("--engine", "ray"), "pip install 'fusion-lens[ray]'"),
    ],
)
def test_what_needs_an_extra_names_it(home: Path, asked: tuple[str, ...], says: str) -> None:
    out = home / "never"
    told = done(home / "venv/bin/fusion-lens", "run", *asked, "--out", out, cwd=home, expected=1)
    assert says in told
    assert not out.exists() or not any(out.iterdir())


def test_all_extras_install_beside_it(home: Path, wheel: Path) -> None:
    python, pins = home / "venv/bin/python", ("-c", ROOT / "constraints.txt")
    found = (
        "import sys; from importlib.util import find_spec; "
        "print(*(find_spec(name) is not None for name in sys.argv[1:]))"
    )
    before = done(python, "-c", found, *EXTRAS.values(), cwd=home).split()
    # which TransformerLens brings
    assert {name for name, there in zip(EXTRAS, before, strict=True) if there == "True"} <= {
        "pandas"
    }
    done(python, *PIP, "install", *pins, f"{wheel}[all]", cwd=home)
    assert done(python, "-c", found, *EXTRAS.values(), cwd=home).split() == ["True"] * len(EXTRAS)
    done(python, *PIP, "check", cwd=home)
    assert done(home / "venv/bin/fusion-lens", "--version", cwd=home) == "fusion-lens 0.1.0\n"
