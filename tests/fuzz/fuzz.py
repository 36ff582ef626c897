"""Files that were tampered with, given to every reader: `python tests/fuzz/fuzz.py --seconds 600`.

With atheris half of the time goes to changes that follow what they reach in the package (coverage
of fusion_lens alone); the other half, without it all, to changes that are drawn. A file is kept in
`corpus/` if it is a finding, and with `--keep` also if its reader ends on it in a new way. Each
reader has a process for each way: one that crashes or hangs is a finding, and the others go on.
Ends with 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from readers import Reader
    from trials import Outcome

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
HANGS = 5.0
"""Seconds that one file may take."""
LARGEST = 6_000
"""Bytes of a file that is kept; a finding is kept whatever its size."""
MOST_KEPT = 40
"""Files that are kept of a reader."""


class Keeper:
    """What a reader ended on, counted, and the files that are kept of it."""

    def __init__(self, reader: Reader, scratch: Path, *, keep: bool) -> None:
        self.reader = reader
        self.scratch = scratch / "scratch"
        self.folder = scratch
        self.trials = 0
        self.read = 0
        self.findings: dict[str, str] = {}
        self._keep = keep
        self._told_at = 0.0
        self._known: set[str] = set()
        self._n_kept = 0
        for path in kept(reader.name):
            self._n_kept += 1
            self._known.add(self.trial(path.read_bytes()).place)

    def trial(self, content: bytes) -> Outcome:
        """Try a file; keep it if it is a finding or ends on something new."""
        from trials import tried

        self.trials += 1
        faulthandler.dump_traceback_later(HANGS, exit=True)
        outcome = tried(self.reader, content, self.scratch)
        faulthandler.cancel_dump_traceback_later()
        self.read += outcome.place == "read"
        if outcome.fault is not None and outcome.place not in self.findings:
            self.findings[outcome.place] = outcome.fault
            saved_as = keep_file(self.reader.name, content)
            print(f"FINDING {self.reader.name}: {outcome.fault}\n  {saved_as}", flush=True)
        elif outcome.place not in self._known and self._has_room(content):
            self._n_kept += 1
            keep_file(self.reader.name, content)
        self._known.add(outcome.place)
        # libFuzzer ends the process where it stands
        if time.monotonic() > self._told_at + 0.2:
            self.tell()
        return outcome

    def _has_room(self, content: bytes) -> bool:
        return self._keep and len(content) <= LARGEST and self._n_kept < MOST_KEPT

    def tell(self) -> None:
        """Write what came of it so far."""
        self._told_at = time.monotonic()
        told = {
            "trials": self.trials,
            "read": self.read,
            "endings": len(self._known),
            "findings": sorted(self.findings),
        }
        (self.folder / "told.json").write_text(json.dumps(told), "utf-8")


def kept(name: str) -> list[Path]:
    """The files that were kept of a reader."""
    return sorted((CORPUS / name).glob("*"))


def keep_file(name: str, content: bytes) -> Path:
    """Add a file to the corpus."""
    path = CORPUS / name / hashlib.sha256(content).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def has_atheris() -> bool:
    """Whether the changes can follow what they reach."""
    from importlib.util import find_spec

    return find_spec("atheris") is not None


def drawn(keeper: Keeper, seconds: float, seed: int) -> None:
    """Changes of seeds, of what was kept, and of what was new."""
    from mutations import changed

    rng = Random(seed)
    seeds = [*keeper.reader.contents(), *(path.read_bytes() for path in kept(keeper.reader.name))]
    endings: set[str] = set()
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        content = changed(rng.choice(seeds), keeper.reader.kind, rng, seeds)
        outcome = keeper.trial(content)
        if outcome.place not in endings and len(seeds) < 200:
            endings.add(outcome.place)
            seeds.append(content)


def guided(keeper: Keeper, seconds: float, seed: int) -> None:
    """The same changes and libFuzzer's own, of whatever reached something new. Does not return."""
    import atheris
    from mutations import MOST, changed

    seeds = keeper.reader.contents()
    corpus = keeper.folder / "corpus"
    corpus.mkdir(exist_ok=True)
    for number, content in enumerate([*seeds, *(p.read_bytes() for p in kept(keeper.reader.name))]):
        (corpus / str(number)).write_bytes(content)

    def mutated(content: bytes, most: int, seed: int) -> bytes:
        rng = Random(seed)
        if rng.random() < 0.15:
            return bytes(atheris.Mutate(content, most))
        return changed(bytes(content), keeper.reader.kind, rng, seeds)[:most]

    arguments = (
        *("-verbosity=0", "-rss_limit_mb=6000", f"-timeout={int(HANGS) * 4}"),
        f"-artifact_prefix={keeper.folder}/",
        *(f"-max_len={MOST}", f"-seed={seed + 1}", f"-max_total_time={max(1, int(seconds))}"),
    )
    atheris.Setup(
        [sys.argv[0], *arguments, str(corpus)],
        lambda content: void(keeper.trial(content)),
        custom_mutator=mutated,
    )
    atheris.Fuzz()


def void(_: object) -> None:
    """atheris takes only None."""


def one(name: str, seconds: float, seed: int, folder: Path, keep: bool, draw: bool) -> None:
    """Fuzz one reader in this process."""
    sys.path.insert(0, str(HERE))
    follow = has_atheris() and not draw
    if follow:
        import atheris

        with atheris.instrument_imports(include=["fusion_lens"]):
            from readers import BY_NAME
    else:
        from readers import BY_NAME

    from trials import tried

    # a reader's first call imports what it needs, which takes longer than a trial may
    for content in BY_NAME[name].contents():
        outcome = tried(BY_NAME[name], content, folder / "scratch")
        if outcome.place != "read":
            raise AssertionError(f"{name} must read its seeds, but: {outcome}")
    keeper = Keeper(BY_NAME[name], folder, keep=keep)
    if follow:
        guided(keeper, seconds, seed)
    else:
        drawn(keeper, seconds, seed)
    keeper.tell()


def run(
    name: str, seconds: float, options: argparse.Namespace, *, draw: bool
) -> tuple[dict[str, object], bool]:
    """Fuzz one reader in a process of its own; what it told, and whether there was a finding."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        (Path(folder) / "scratch").mkdir()
        arguments = [sys.executable, __file__, "--reader", name, "--folder", folder]
        arguments += ["--seconds", str(seconds), "--seed", str(options.seed)]
        arguments += ["--keep"] * options.keep + ["--draw"] * draw
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            arguments, env=environment, capture_output=True, text=True, errors="replace"
        )
        told_path = Path(folder) / "told.json"
        told = json.loads(told_path.read_text("utf-8")) if told_path.is_file() else {}
        found = "FINDING" in done.stdout
        for line in done.stdout.splitlines():
            if found:
                print(f"  {line}", flush=True)
        if done.returncode != 0:
            last = Path(folder) / "scratch"
            from_file = _last(name, last)
            print(f"FINDING {name}: ended with {done.returncode}; {from_file}", flush=True)
            print(done.stderr[-3000:], flush=True)
            found = True
    return told, found


def _last(name: str, scratch: Path) -> str:
    """Keep the file that a process ended on."""
    sys.path.insert(0, str(HERE))
    from readers import BY_NAME

    path = scratch / BY_NAME[name].file
    return str(keep_file(name, path.read_bytes())) if path.is_file() else "before its first file"


def names(slow: bool = True) -> Iterator[str]:
    """All readers."""
    sys.path.insert(0, str(HERE))
    from readers import READERS

    yield from (reader.name for reader in READERS if slow or not reader.slow)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="add files that end in a new way")
    parser.add_argument("--draw", action="store_true", help="without atheris, also where it is")
    parser.add_argument("--only", nargs="*", help="readers; all if left out")
    parser.add_argument("--reader", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reader:
        one(
            options.reader,
            options.seconds,
            options.seed,
            options.folder,
            options.keep,
            options.draw,
        )
        return 0
    chosen = options.only or list(names())
    guide = "drawn changes" if options.draw or not has_atheris() else "atheris and drawn changes"
    print(f"{len(chosen)} readers, {options.seconds:.0f} s, {guide}, seed {options.seed}")
    trials, faulty = 0, []
    # each way finds what the other does not: drawn changes are of the seeds, and far quicker
    ways = (True,) if options.draw or not has_atheris() else (False, True)
    for name, draw in product(chosen, ways):
        told, found = run(name, options.seconds / len(chosen) / len(ways), options, draw=draw)
        trials += int(str(told.get("trials", 0)))
        faulty += [name] * (found and name not in faulty)
        print(f"{name}{', drawn' * draw}: {json.dumps(told)}", flush=True)
    print(f"{trials:,} files tried; findings in {', '.join(faulty) or 'no reader'}")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
