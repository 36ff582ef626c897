"""The corpus once more, and a short form of `make fuzz`."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from fuzz import CORPUS, kept
from mutations import changed
from readers import READERS, Reader
from trials import tried

FAST = [reader for reader in READERS if not reader.slow]
ONCE = settings(
    max_examples=12,
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
