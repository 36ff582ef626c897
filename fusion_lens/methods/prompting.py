"""Prompting: examples of what is wanted before the question, and no steering at all.

The baseline that most steering papers lose to, so that it belongs into every comparison. Gives
text, for `prompts.question_prompt(prefix=...)` or before any other prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from fusion_lens.contrasts import Example
from fusion_lens.errors import ContrastError


def demonstrations(
    examples: Sequence[Example | tuple[str, str]],
    n: int,
    *,
    seed: int,
    separator: str = "\n\n",
) -> str:
    """`n` of the examples (or of pairs of prompt and text), each behind its prompt and followed by
    `separator`: drawn without replacement, in the order drawn. 0 is the empty text.

    Give none that is about what will be asked: it would hold the answer.

    Raises:
        ContrastError: if `n` is below 0 or above the number of examples.
    """
    if not 0 <= n <= len(examples):
        raise ContrastError(
            f"0 <= n <= {len(examples)}, the number of examples, must hold, but got {n}; "
            "add some or ask for fewer."
        )
    drawn = Random(seed).sample(list(examples), n)
    wholes = (each.whole if isinstance(each, Example) else "".join(each) for each in drawn)
    return "".join(whole + separator for whole in wholes)
