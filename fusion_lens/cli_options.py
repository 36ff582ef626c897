"""The options that commands share, and the settings that are made of them.

An option whose default depends on the protocol is None until it is given.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

T = TypeVar("T")

SegmentsOption = Annotated[
    str, typer.Option(help="full, thirds, layers, or a number of even segments.")
]
SlotsOption = Annotated[
    int | None, typer.Option(help="Rows generated at once; by the device's size if not given.")
]
CacheOption = Annotated[
    int | None,
    typer.Option(help="Positions of a row's cache; by the file's longest question if not given."),
]
ExecutorOption = Annotated[
    str, typer.Option(help="lean, hooks (the reference, slower), or auto: lean where it can be.")
]
ChatOption = Annotated[bool, typer.Option(help="Wrap questions in the tokenizer's chat template.")]
StorageOption = Annotated[
    str | None, typer.Option(help="Optuna storage URL that gets every finished study.")
]


def recipe_of(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub name; without it Atlas, the bundled model."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="float32, bfloat16, float16 or float64.",
            show_default="float32; in 8-bit float16, in 4-bit bfloat16",
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; chosen if not given.")] = None,
    device_map: Annotated[
        str | None,
        typer.Option(
            help="auto, balanced or sequential: blocks over several GPUs, on hook points; in the "
            "place of --device."
        ),
    ] = None,
    load_in_8bit: Annotated[
        bool,
        typer.Option("--load-in-8bit", help="Matrices as bitsandbytes' LLM.int8, on hook points."),
    ] = False,
    load_in_4bit: Annotated[
        bool,
        typer.Option("--load-in-4bit", help="Matrices as bitsandbytes' NF4, on hook points."),
    ] = False,
) -> Any:
    """The options of every command that opens a model, as a recipe of it."""
    from fusion_lens.recipes import Recipe

    return Recipe(model, dtype, device, load_in_8bit, load_in_4bit, device_map)


def settings_of(
    protocol: Annotated[
        str,
        typer.Option(
            help="controlled, or paper: what Fusion Steering's authors ran, metrics and judges on "
            "prompt + completion."
        ),
    ] = "controlled",
    trials: Annotated[
        int | None,
        typer.Option(
            help="Trials per question and tuned arm, the zero plan included.",
            show_default="30; paper: 5, without it",
        ),
    ] = None,
    round_size: Annotated[
        int | None,
        typer.Option(
            help="Trials asked at once; the sampler learns between rounds.", show_default="5"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of samplers and bootstrap.", show_default="0")
    ] = None,
    parametrisation: Annotated[
        str | None,
        typer.Option(
            help="coeff: one in [0, 1.5] per segment; alpha_gamma: the paper's pair, each in "
            "[0.01, 1].",
            show_default="coeff; paper: alpha_gamma",
        ),
    ] = None,
    objectives: Annotated[
        str | None,
        typer.Option(
            help="weighted: 0.7 overlap - 0.3 clipped perplexity; pareto: the two kept apart "
            "(the plan chosen is still the weighted best).",
            show_default="weighted",
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="question: a constant shift; sequence: the authors' hook, without a cache.",
            show_default="question; paper: sequence",
        ),
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="all, prompt or completion.", show_default="all")
    ] = None,
    steer_special: Annotated[
        bool | None,
        typer.Option(
            "--steer-special/--spare-special",
            help="Steer BOS and other special tokens too.",
            show_default="spare; paper: steer",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="New tokens per completion, at most.", show_default="48; paper: 100"),
    ] = None,
    explanation_tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens of the model's own explanation; 0: none.", show_default="48; paper: 100"
        ),
    ] = None,
    explanation_marker: Annotated[
        str | None,
        typer.Option(
            help="Text that the model's explanation follows.",
            show_default="none; paper: **Explanation:**",
        ),
    ] = None,
    perplexity_model: Annotated[
        str | None,
        typer.Option(
            help="A causal language model, by folder or hub name (or atlas), that measures "
            "perplexity.",
            show_default="the steered one, unsteered; paper: openai-community/gpt2",
        ),
    ] = None,
    slots: SlotsOption = None,
    cache_length: CacheOption = None,
    executor: ExecutorOption = "auto",
    chat: ChatOption = False,
) -> Any:
    """The options that `run` and `tune` share, as a protocol with the settings that were given."""
    from fusion_lens.protocols import protocol as named

    base = named(protocol)
    tuning = base.experiment.tuning
    search = given(
        tuning.search,
        trials=trials,
        round_size=round_size,
        seed=seed,
        parametrisation=parametrisation,
        objectives=objectives,
    )
    generation = given(
        tuning.generation,
        max_new_tokens=max_new_tokens,
        slots=slots,
        cache_length=cache_length,
        executor=executor,
    )
    tuned = given(
        replace(
            tuning,
            search=search,
            generation=generation,
            template=replace(tuning.template, chat=chat),
        ),
        mean=mean,
        positions=positions,
        steer_special=steer_special,
        explanation_tokens=explanation_tokens,
        explanation_marker=explanation_marker,
    )
    return given(
        replace(base, experiment=replace(base.experiment, tuning=tuned)),
        perplexity_model=perplexity_model,
    )


def sources_of(
    start: Annotated[
        Path | None, typer.Option(help="A preset of suggest, whose coefficients are tried first.")
    ] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a finished run of other questions: what was best for the most similar "
            "of them is tried first."
        ),
    ] = None,
    gradient_start: Annotated[
        bool,
        typer.Option(
            "--gradient-start",
            help="Try first what raises the answer's log-probability most steeply.",
        ),
    ] = False,
) -> Any:
    """The options of where searches start, as the sources they name."""
    from fusion_lens.start_sources import StartSources

    return StartSources(start, start_from, gradient_start)


def given(config: T, **options: Any) -> T:
    """The config with the options that were given."""
    return replace(config, **{name: value for name, value in options.items() if value is not None})  # type: ignore[type-var]


def with_options(
    **makers: Callable[..., Any],
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """The command with the options of a function in the place of the parameter that takes what it
    makes: `with_options(settings=settings_of)`. They stand after the command's own."""
    shared = {
        name: inspect.signature(maker, eval_str=True).parameters for name, maker in makers.items()
    }

    def decorate(command: Callable[..., int]) -> Callable[..., int]:
        own = inspect.signature(command, eval_str=True).parameters

        def wrapped(**options: Any) -> int:
            made = {
                name: maker(**{option: options.pop(option) for option in shared[name]})
                for name, maker in makers.items()
            }
            return command(**options, **made)

        kept = [parameter for name, parameter in own.items() if name not in makers]
        added = [parameter for each in shared.values() for parameter in each.values()]
        wrapped.__signature__ = inspect.Signature([*kept, *added])  # type: ignore[attr-defined]
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        return wrapped

    return decorate
