"""Two texts -> which words of the second are not in the first, in order; as HTML on request.

Words are compared, by difflib's longest matches; white space is kept, and is no difference.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from html import escape


def marked_words(old: str, new: str) -> list[tuple[str, bool]]:
    """Pieces of `new`, which they make up together; True where their words differ from `old`'s."""
    pieces = re.findall(r"\s+|\S+", new)
    words = [i for i, piece in enumerate(pieces) if not piece.isspace()]
    flags = [False] * len(pieces)
    # junk would be what is frequent, and long texts would be marked where they agree
    matcher = SequenceMatcher(None, old.split(), [pieces[i] for i in words], autojunk=False)
    for tag, _, _, start, stop in matcher.get_opcodes():
        if tag != "equal" and start < stop:
            # the white space between two marked words is marked with them
            flags[words[start] : words[stop - 1] + 1] = [True] * (
                words[stop - 1] + 1 - words[start]
            )
    marked: list[tuple[str, bool]] = []
    for piece, flag in zip(pieces, flags, strict=True):
        if marked and marked[-1][1] == flag:
            marked[-1] = (marked[-1][0] + piece, flag)
        else:
            marked.append((piece, flag))
    return marked


def marked_html(pieces: Iterable[tuple[str, bool]]) -> str:
    """The pieces, escaped, the True ones in `<mark>`."""
    return "".join(
        f"<mark>{escape(piece)}</mark>" if flag else escape(piece) for piece, flag in pieces
    )
