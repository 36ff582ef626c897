"""Which sampler finds more in 30 trials? The segmented arm on Atlas' dev questions, paired.

Run: `python benchmarks/samplers.py`; it prints a Markdown table. The first row is the default;
differences are in the best objective of a question, with a 95 % cluster bootstrap.
"""

from __future__ import annotations

import dataclasses

import optuna

from fusion_lens import (
    ExperimentConfig,
    SearchConfig,
    TuningConfig,
    load_model,
    load_questions,
    run,
    select_questions,
)
from fusion_lens.atlas import QUESTIONS
from fusion_lens.statistics import cluster_bootstrap

DEFAULT = SearchConfig()
CANDIDATES = {
    "multivariate TPE, rounds of 5": DEFAULT,
    "one trial a round": dataclasses.replace(DEFAULT, round_size=1),
    "univariate TPE": dataclasses.replace(
        DEFAULT, sampler=lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=False)
    ),
    "5 start-up trials, not 10": dataclasses.replace(
        DEFAULT,
        sampler=lambda seed: optuna.samplers.TPESampler(
            seed=seed, multivariate=True, n_startup_trials=5
        ),
    ),
    "random": dataclasses.replace(
        DEFAULT, sampler=lambda seed: optuna.samplers.RandomSampler(seed=seed)
    ),
}


def main() -> None:
    """Run every candidate on the same questions and print the comparison."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    model = load_model()
    questions = select_questions(load_questions(QUESTIONS), split="dev", limit=60)
    first: list[float] = []
    print("| search | best objective | difference to the first | 95 % |")
    print("| --- | ---: | ---: | ---: |")
    for name, search in CANDIDATES.items():
        config = ExperimentConfig(arms=("segmented",), tuning=TuningConfig(search=search))
        records = run(model, questions, config).records
        values = [record.objective for record in records]
        first = first or values
        subjects = [record.subject for record in records]
        mean = cluster_bootstrap(values, subjects).mean
        gap = cluster_bootstrap([a - b for a, b in zip(values, first, strict=True)], subjects)
        interval = f"{gap.low:+.3f} to {gap.high:+.3f}"
        print(f"| {name} | {mean:.3f} | {gap.mean:+.3f} | {interval} |", flush=True)


if __name__ == "__main__":
    main()
