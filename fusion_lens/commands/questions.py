"""`questions` of Atlas' world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fusion_lens.cli_inputs import open_model, require_writable
from fusion_lens.cli_options import SlotsOption


def questions(
    atlas: Annotated[int, typer.Option("--atlas", help="How many questions to make.")],
    seed: Annotated[int, typer.Option(help="Another seed draws other people of the world.")] = 1,
    out: Annotated[Path, typer.Option(help="The JSONL file to write.")] = Path("questions.jsonl"),
    slots: SlotsOption = None,
) -> int:
    """Make questions from Atlas' world that Atlas fails, half of them dev and half test."""
    from fusion_lens.atlas.questions import make_questions
    from fusion_lens.generation import GenerationConfig, Row
    from fusion_lens.generation import generate as generate_rows
    from fusion_lens.progress import bars
    from fusion_lens.prompts import tokenize
    from fusion_lens.questions import save_questions
    from fusion_lens.recipes import Recipe

    require_writable(out)
    model = open_model(Recipe())

    def complete(prompts: Sequence[str], max_new_tokens: int) -> list[tuple[str, bool]]:
        config = GenerationConfig(max_new_tokens=max_new_tokens, slots=slots)
        rows = [Row(tokenize(model, prompt)) for prompt in prompts]
        with bars() as progress:
            written = generate_rows(
                model, rows, config, progress=lambda done: progress("asking", done, len(rows))
            )
        return [(completion.text, completion.ended) for completion in written]

    made = make_questions(atlas, seed, complete)
    save_questions(made, out)
    print(f"{len(made)} questions written to {out}")
    return 0
