"""`export` a plan as one vector per layer for other programs, and `import` theirs as a plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fusion_lens.cli_inputs import open_model, require_writable
from fusion_lens.cli_options import recipe_of, with_options
from fusion_lens.errors import ConfigError, one_of

_FORMATS = ("gguf", "safetensors")


def export(
    plan: Annotated[Path, typer.Argument(help="A plan that tune or run saved.")],
    format: Annotated[
        str,
        typer.Option(
            help="gguf: a control vector of llama.cpp; safetensors: layer.K, for a forward hook."
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.")],
    approximate: Annotated[
        bool,
        typer.Option(
            "--approximate",
            help="What no vector can say, such as spared special tokens or a gate, becomes what "
            "comes nearest; printed, and told in the file.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            help="For gguf: checkpoint folder or hub name whose config names the architecture; "
            "not needed for Atlas."
        ),
    ] = None,
) -> int:
    """Write what a plan adds to every token, one vector per layer, for other programs."""
    from fusion_lens.gguf_files import FIRST_LAYER, save_gguf
    from fusion_lens.models import architecture_of
    from fusion_lens.plan_files import load_plan
    from fusion_lens.vector_files import save_vectors
    from fusion_lens.vectors import to_vectors

    gguf = one_of("format", format, _FORMATS) == "gguf"
    loaded = load_plan(plan)
    first_layer = FIRST_LAYER if gguf else 0
    vectors = to_vectors(loaded, first_layer=first_layer, approximate=approximate)
    require_writable(out)
    if gguf:
        if model is None and loaded.model.name != "atlas":
            raise ConfigError(
                "a gguf file names its model's architecture; give --model, the checkpoint of "
                f"{loaded.model.name!r}."
            )
        save_gguf(vectors, out, architecture=architecture_of(model))
    else:
        save_vectors(vectors, out)
    print(f"approximated: {vectors.told['approximated']}")
    print(f"{vectors} saved to {out}")
    return 0


@with_options(recipe=recipe_of)
def import_vectors(
    file: Annotated[
        Path, typer.Argument(help="A gguf control vector, or safetensors with layer.K.")
    ],
    out: Annotated[Path, typer.Option(help="Where the plan goes.")],
    *,
    recipe: Any,
) -> int:
    """Make a plan of vectors that another program wrote, for --model: added after their blocks to
    every token, as they are."""
    from fusion_lens.gguf_files import is_gguf, load_gguf
    from fusion_lens.identity import identify
    from fusion_lens.plan_files import save_plan
    from fusion_lens.vector_files import load_vectors
    from fusion_lens.vectors import from_vectors

    vectors = load_gguf(file) if is_gguf(file) else load_vectors(file)
    require_writable(out)
    model = identify(open_model(recipe))
    save_plan(from_vectors(vectors, model), out)
    told = vectors.told
    if told.get("weights_sha256", model.weights) != model.weights:
        made_on = told.get("model", "another model")
        print(
            f"note: the vectors were made on {made_on!r}, whose weights have another digest than "
            f"those of {model.name!r}",
            file=sys.stderr,
        )
    if told.get("approximated", "nothing") != "nothing":
        print(
            f"note: the file says what was approximated: {told['approximated']!r}", file=sys.stderr
        )
    print(f"{vectors} saved to {out}, as a plan for {model.name}")
    return 0
