"""`suggest`: a sweep over a few questions, kept as a preset to start searches from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_lens.cli_inputs import (
    decimals,
    open_model,
    open_questions,
    require_writable,
    segments_of,
)
from fusion_lens.cli_options import SegmentsOption, recipe_of, settings_of, with_options
from fusion_lens.errors import ConfigError


@with_options(recipe=recipe_of, settings=settings_of)
def suggest(
    questions: Annotated[
        str | None,
        typer.Option(
            help="JSONL or CSV file, or simpleqa (from the hub); without it Atlas' own questions."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Which split, if the file names splits: not the one reported.")
    ] = "dev",
    limit: Annotated[
        int,
        typer.Option(
            help="Questions to try, a seeded sample in proportion to topics and answer types."
        ),
    ] = 8,
    segments: SegmentsOption = "thirds",
    strengths: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated coefficients that are tried.",
            show_default="0.125,0.25,0.5,0.75,1,1.25,1.5",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the preset goes.")] = Path("preset.json"),
    picture: Annotated[
        Path | None, typer.Option(help="HTML file of a heat map; none without it.")
    ] = None,
    *,
    recipe: Any,
    settings: Any,
) -> int:
    """Try every segment of layers at several strengths on a few questions: which work on this
    model, and a preset for tune --start and run --start."""
    from dataclasses import replace

    from fusion_lens.pictures import write_figures
    from fusion_lens.preset_files import save_preset
    from fusion_lens.progress import bars
    from fusion_lens.questions import select_questions, stratified
    from fusion_lens.recipes import open_perplexity
    from fusion_lens.suggestion_plots import plot_suggestion
    from fusion_lens.suggestions import STRENGTHS
    from fusion_lens.suggestions import suggest as sweep

    if limit < 1:
        raise ConfigError(f"limit must be at least 1, but got {limit}.")
    if picture is not None and picture.suffix != ".html":
        raise ConfigError(f"a picture must be an .html file, but got {str(picture)!r}.")
    tuning = settings.experiment.tuning
    tried = STRENGTHS if strengths is None else decimals("strengths", strengths)
    matching = select_questions(open_questions(questions, recipe.model), split=split)
    asked = stratified(matching, min(limit, len(matching)), tuning.search.seed)
    for path in (out, picture):
        if path is not None:
            require_writable(path)
    fluency = open_perplexity(settings.perplexity_model, recipe.device)
    opened = open_model(recipe)
    with bars() as progress:
        found = sweep(
            opened,
            asked,
            segments=segments_of(segments),
            strengths=tried,
            config=tuning,
            fluency=fluency,
            progress=progress,
        )
    save_preset(found.preset, out)
    found.table().show()
    print()
    found.preset.table().show()
    print(f"preset saved to {out}")
    if picture is not None:
        drawn = replace(plot_suggestion(found), name=picture.stem)
        missing = write_figures([drawn], picture.parent)
        print(f"picture written to {picture}" + ("" if missing is None else f"; {missing}"))
    return 3 if found.failures else 0
