"""Text of Atlas' world that has nothing to do with the questions, for the divergence of a steering.

Documents like those of training, from a part of the stream that training never reached. People of
the questions never enter it.

Run as a module to remake the shipped file.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fusion_lens.atlas import UNRELATED
from fusion_lens.atlas.corpus import draw_documents
from fusion_lens.atlas.world import WORLD_SEED, make_world

N_DOCUMENTS = 72
_SEED = 20_000


def make_unrelated(n: int = N_DOCUMENTS) -> str:
    """`n` documents, an empty line between two."""
    documents = draw_documents(make_world(WORLD_SEED), seed=_SEED, step=0, count=n)
    return "\n\n".join(document.text.strip() for document in documents) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the text."""
    parser = argparse.ArgumentParser(prog="python -m fusion_lens.atlas.unrelated")
    parser.add_argument("--out", type=Path, default=UNRELATED)
    parser.add_argument("--n", type=int, default=N_DOCUMENTS)
    options = parser.parse_args(arguments)
    options.out.write_text(make_unrelated(options.n), encoding="utf-8")


if __name__ == "__main__":
    main()
