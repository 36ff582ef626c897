"""The published protocol and the controlled one, as settings.

`controlled` (the default) is what every config of the package says by itself. `paper` is what the
authors of Fusion Steering ran (arXiv 2505.22572, docs/evaluation.md): another prompt for the
baseline, the authors' hook, span and search of five trials without the zero plan, and metrics and
judges that read prompt and completion.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fusion_lens.decoding import GenerationConfig
from fusion_lens.errors import one_of
from fusion_lens.experiment_config import ExperimentConfig
from fusion_lens.preparation import TuningConfig
from fusion_lens.prompts import Template
from fusion_lens.search import SearchConfig, default_tpe


@dataclass(frozen=True, slots=True)
class Protocol:
    """Settings of a run, and what else the protocol decides: whether failed questions are those the
    judge calls INCORRECT, whether it grades, and which model measures perplexity (None: the
    steered one, unsteered)."""

    experiment: ExperimentConfig = field(default_factory=ExperimentConfig)
    failed_by_judge: bool = False
    grade: bool = False
    perplexity_model: str | None = None


PAPER = Protocol(
    experiment=ExperimentConfig(
        arms=("baseline", "full", "segmented"),
        tuning=TuningConfig(
            search=SearchConfig(
                trials=5, parametrisation="alpha_gamma", zero_first=False, sampler=default_tpe
            ),
            generation=GenerationConfig(max_new_tokens=100),
            template=Template(
                explain="Question: {question}\nAnswer: {answer}",
                baseline="{question}",
                strict_span=True,
            ),
            mean="sequence",
            steer_special=True,
            explanation_tokens=100,
            explanation_marker="**Explanation:**",
            metrics="published",
        ),
        reach=False,
    ),
    failed_by_judge=True,
    grade=True,
    perplexity_model="openai-community/gpt2",
)
PROTOCOLS = {"controlled": Protocol(), "paper": PAPER}


def protocol(name: str) -> Protocol:
    """The protocol of that name.

    Raises:
        ConfigError: if there is none.
    """
    return PROTOCOLS[one_of("protocol", name, tuple(PROTOCOLS))]
