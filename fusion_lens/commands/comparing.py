"""`compare-methods`: the method bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_lens.cli_inputs import (
    open_contrasts,
    open_model,
    require_writable,
    whole_numbers,
)
from fusion_lens.cli_options import recipe_of, with_options


@with_options(recipe=recipe_of)
def compare_methods(
    contrasts: Annotated[
        str | None,
        typer.Option(
            help="JSONL or CSV of source, target and control texts in three parts; for Atlas "
            "sources or context.",
            show_default="sources for Atlas",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated.",
            show_default="prompting,fusion,generic,fusion_masked,generic_masked,caa,act_add,"
            "control_mean,control_pca,iti,linear_act,dsas_end_to_end,austeer",
        ),
    ] = None,
    gates: Annotated[
        str,
        typer.Option(
            help="Comma-separated: dsas, and its controls permuted and constant; or none."
        ),
    ] = "dsas",
    units: Annotated[
        str, typer.Option(help="Numbers of units that AUSteer and masks are tried with.")
    ] = "1,10,100",
    unrelated: Annotated[
        Path | None,
        typer.Option(help="Text file for the divergence; without it Atlas' own for Atlas."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens per completion, at most.")] = 48,
    seed: Annotated[int, typer.Option(help="Seed of folds, draws and bootstrap.")] = 0,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Where a record per method and strength goes.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for figures; none without it.")] = None,
    *,
    recipe: Any,
) -> int:
    """Steering methods on the same texts: effect on a behaviour against damage to what must stay,
    with and without a gate."""
    from fusion_lens.atlas import UNRELATED
    from fusion_lens.divergence import unrelated_texts
    from fusion_lens.front_plots import plot_fronts
    from fusion_lens.method_bench import compare_methods as compare
    from fusion_lens.method_suite import METHODS
    from fusion_lens.pictures import write_figures
    from fusion_lens.progress import bars

    examples = open_contrasts(contrasts, recipe.model)
    if as_json is not None:
        require_writable(as_json)
    opened = open_model(recipe)
    text = UNRELATED if unrelated is None and recipe.model is None else unrelated
    with bars() as progress:
        bench = compare(
            opened,
            examples,
            methods=METHODS if methods is None else tuple(methods.split(",")),
            gates=() if gates == "none" else tuple(gates.split(",")),
            units=whole_numbers("units", units),
            unrelated=() if text is None else unrelated_texts(opened, text),
            max_new_tokens=max_new_tokens,
            seed=seed,
            progress=progress,
        )
    for table in (bench.table(), *bench.gate_tables()):
        table.show()
        print()
    if as_json is not None:
        bench.write(as_json)
        print(f"written to {as_json}")
    if out is not None:
        missing = write_figures([plot_fronts(bench)], out)
        print(missing or f"figures written to {out}")
    return 0
