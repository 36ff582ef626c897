"""The corpus once more, and a short form of `make fuzz`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import CORPUS, kept
from mutations import changed
from readers import READERS, Reader
from trials import tried

from fusion_lens.errors import InputFileError

FAST = [reader for reader in READERS if not reader.slow]
ONCE = settings(
    max_examples=8,
    # the long form draws anew; this one says the same of the same code
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def name_of(reader: Reader) -> str:
    return reader.name


@pytest.mark.parametrize("reader", FAST, ids=name_of)
def test_what_the_packages_own_writers_wrote_is_read(reader: Reader, tmp_path: Path) -> None:
    for content in reader.contents():
        outcome = tried(reader, content, tmp_path)
        assert (outcome.place, outcome.fault) == ("read", None)


@pytest.mark.parametrize("reader", FAST, ids=name_of)
def test_what_was_once_found_is_read_or_refused(reader: Reader, tmp_path: Path) -> None:
    for path in kept(reader.name):
        assert tried(reader, path.read_bytes(), tmp_path).fault is None, path.name


@pytest.mark.parametrize("reader", FAST, ids=name_of)
@ONCE
@given(seed=st.integers(0, 2**32))
def test_a_changed_file_is_read_or_refused(reader: Reader, tmp_path: Path, seed: int) -> None:
    rng, seeds = Random(seed), reader.contents()
    content = changed(rng.choice(seeds), reader.kind, rng, seeds)
    assert tried(reader, content, tmp_path).fault is None


@pytest.mark.parametrize("reader", FAST, ids=name_of)
@ONCE
@given(content=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(reader: Reader, tmp_path: Path, content: bytes) -> None:
    assert tried(reader, content, tmp_path).fault is None


def test_the_corpus_is_small_and_of_readers_there_are() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= {reader.name for reader in READERS}
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 10**6


def stored(size: int) -> torch.Tensor:
    try:
        return torch.zeros(size)
    except RuntimeError as error:
        raise InputFileError("a", "too large") from error


FAULTS: dict[str, tuple[Callable[[], object], str]] = {
    "another exception": (lambda: {}["a"], "KeyError: 'a'"),
    "a message that cannot be printed": (
        lambda: (_ for _ in ()).throw(InputFileError("a", "\ud800")),
        "its message cannot be printed",
    ),
    "too much memory": (lambda: torch.zeros(2**29), "RuntimeError"),
    "too much memory, caught": (lambda: stored(2**29), "it asks for more than 1073741824 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told(fault: str, tmp_path: Path) -> None:
    act, message = FAULTS[fault]

    def read(folder: Path) -> None:
        act()

    if "memory" in fault and sys.platform != "linux":
        pytest.skip("memory is limited on Linux alone")
    reader = Reader("r", "r.txt", "bytes", read, lambda folder: [{"r.txt": b"a"}])
    assert message in (tried(reader, b"b", tmp_path).fault or "")


@pytest.mark.parametrize("reader", FAST, ids=name_of)
def test_changes_of_a_seed_differ_and_can_be_made_again(reader: Reader) -> None:
    seeds = reader.contents()
    made = [changed(seeds[0], reader.kind, Random(n), seeds) for n in range(40)]
    assert made == [changed(seeds[0], reader.kind, Random(n), seeds) for n in range(40)]
    assert len({*made, seeds[0]}) > 25
