"""Do the features that an attribution names do what the plan does?

For tuned plans: the gold answer's log-probability after the prompt, in nats above the unsteered
model's, when only some of the plan's content is injected: the `k` features of the largest effects,
`k` random active features at the same norm in every layer, the error alone, all but the error, and
all of it. What random features contribute is small, so that their norm is had by scaling it up.
Features are ranked on the reference run and their contributions taken from the steered completion,
so that a feature is not chosen on the tokens it is injected from; what they do is measured after
the question and, unchanged, after a paraphrase. `k` counts features per dictionary: of six SAEs
the top 10 are 10 in every layer, of a crosscoder 10 in all.

Means have cluster-bootstrap intervals; what a part does of the whole is a ratio of sums, never a
mean of ratios, in which questions that the plan does not move would decide.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from statistics import median
from typing import Any

import torch

from fusion_lens.attribution import Attribution, attribute
from fusion_lens.dictionaries import Dictionary
from fusion_lens.engine_log import EngineLog
from fusion_lens.errors import ConfigError
from fusion_lens.interventions import (
    contribution_of,
    keep_error,
    remove_error,
    remove_features,
    with_shift,
)
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan
from fusion_lens.preparation import TuningConfig, seed_of
from fusion_lens.prompts import Prompt, continuation, question_prompt
from fusion_lens.statistics import Interval, cluster_bootstrap, rank_correlation, ratio_of_sums
from fusion_lens.teacher_forcing import Text, gold_text, log_probs
from fusion_lens.tuning import TunedPlan

KS = (1, 2, 5, 10, 20, 50)
PLACES = ("question", "paraphrase")
_REMOVED = 20


@dataclass(frozen=True, slots=True)
class Case:
    """A steered question: its plan, its prompts by place, the tokens of the gold answer behind
    them, of the reference text, and of what was written under the plan."""

    question_id: str
    subject: str
    plan: Plan
    prompts: dict[str, Prompt]
    answer: tuple[int, ...]
    reference: tuple[int, ...]
    completion: tuple[int, ...]

    @staticmethod
    def of(model: HookedModel, tuned: TunedPlan, config: TuningConfig) -> Case | None:
        """From a finished search; None where the plan it chose does nothing, or nothing was
        written. The paraphrase is the question's first."""
        item, question = tuned.job.prepared, tuned.job.prepared.question
        if not tuned.plan.injected_norm or not tuned.best.completion.tokens:
            return None
        prompts = {"question": item.prompt}
        if question.paraphrases:
            text = question.paraphrases[0]
            prompts["paraphrase"] = question_prompt(model, text, config.template)
        tail = item.reference.text[len(item.prompt.text) :]
        return Case(
            question.id,
            question.subject or question.id,
            tuned.plan,
            prompts,
            gold_text(model, item).written,
            continuation(model, item.prompt, tail),
            tuned.best.completion.tokens,
        )


@dataclass(frozen=True, slots=True)
class Gain:
    """What one part of one plan does: nats of the gold answer's log-probability above the unsteered
    model's. `part` is "full", "error", "without error", "top" or "random" (the mean of several
    draws); `k` is 0 where no features are counted."""

    question_id: str
    subject: str
    place: str
    part: str
    k: int
    nats: float


@dataclass(frozen=True, slots=True)
class Faithfulness:
    """Gains of every part of every case; per case the rank correlation between the sizes of
    features' effects and of what removing each does (None: unscored); and by k the median factor
    that random contributions had to be multiplied by."""

    gains: tuple[Gain, ...]
    correlations: dict[str, float | None]
    factors: dict[int, float]

    def interval(self, part: str, k: int = 0, place: str = "question") -> Interval:
        """The mean gain of a part."""
        return _mean(self._of(part, k, place))

    def margin(self, k: int, place: str = "question") -> Interval:
        """The mean gain of the top k above that of k random features, paired by question."""
        top, by_chance = self._of("top", k, place), self._of("random", k, place)
        return _mean({key: top[key] - by_chance[key] for key in top if key in by_chance})

    def ratio(self, part: str, k: int = 0, place: str = "question") -> Interval:
        """A part's gain of the full plan's, as a ratio of sums over questions."""
        own, whole = self._of(part, k, place), self._of("full", 0, place)
        keys = [key for key in own if key in whole]
        return ratio_of_sums(
            [own[key] for key in keys], [whole[key] for key in keys], [key[1] for key in keys]
        )

    @property
    def correlation(self) -> Interval:
        """The mean rank correlation over cases."""
        subjects = {gain.question_id: gain.subject for gain in self.gains}
        names = list(self.correlations)
        return cluster_bootstrap(
            [self.correlations[name] for name in names], [subjects[name] for name in names]
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: every curve with its intervals."""
        ks = sorted({gain.k for gain in self.gains} - {0})
        places = [place for place in PLACES if any(gain.place == place for gain in self.gains)]
        curves = {
            place: {
                "parts": {
                    part: {
                        "nats": asdict(self.interval(part, place=place)),
                        "of_full": asdict(self.ratio(part, place=place)),
                    }
                    for part in ("full", "error", "without error")
                },
                "top": [
                    {
                        "k": k,
                        "nats": asdict(self.interval("top", k, place)),
                        "random": asdict(self.interval("random", k, place)),
                        "above_random": asdict(self.margin(k, place)),
                        "of_full": asdict(self.ratio("top", k, place)),
                        "random_of_full": asdict(self.ratio("random", k, place)),
                    }
                    for k in ks
                ],
            }
            for place in places
        }
        return {
            "curves": curves,
            "rank_correlation": asdict(self.correlation),
            "random_factors": self.factors,
        }

    def _of(self, part: str, k: int, place: str) -> dict[tuple[str, str], float]:
        return {
            (gain.question_id, gain.subject): gain.nats
            for gain in self.gains
            if (gain.part, gain.k, gain.place) == (part, k, place)
        }


def faithfulness(
    model: HookedModel,
    dictionaries: Sequence[Dictionary],
    cases: Sequence[Case],
    *,
    ks: Sequence[int] = KS,
    draws: int = 5,
    seed: int = 0,
    log: EngineLog | None = None,
) -> Faithfulness:
    """Rank features on the reference run, inject parts of every plan, and measure.

    Random features are drawn `draws` times and their gains averaged.

    Raises:
        ConfigError: if a k or `draws` is below 1.
        DictionaryError: see `attribution.attribute`.
    """
    if min((*ks, draws)) < 1:
        raise ConfigError(f"every k and draws must be at least 1, but got {ks=}, {draws=}.")
    asked = [case.prompts["question"] for case in cases]
    ranked = attribute(
        model,
        dictionaries,
        [Text(p, c.reference, c.plan) for p, c in zip(asked, cases, strict=True)],
        log=log,
    )
    found = attribute(
        model,
        dictionaries,
        [Text(p, c.completion, c.plan) for p, c in zip(asked, cases, strict=True)],
        log=log,
    )
    tried = [
        [*_parts(case, rank, parts, ks, draws, seed), *_removals(case, rank, parts)]
        for case, rank, parts in zip(cases, ranked, found, strict=True)
    ]
    nats = iter(_gains(model, cases, tried, log))
    gains: list[Gain] = []
    correlations: dict[str, float | None] = {}
    for case, rank, variants in zip(cases, ranked, tried, strict=True):
        for place in case.prompts:
            seen: dict[tuple[str, int], list[float]] = {}
            for variant in variants:
                seen.setdefault((variant.part, variant.k), []).append(next(nats))
            removed = seen.pop(("removed", 0), [])
            gains += [
                Gain(case.question_id, case.subject, place, part, k, sum(own) / len(own))
                for (part, k), own in seen.items()
            ]
            if place == "question":
                whole = seen["full", 0][0]
                correlations[case.question_id] = rank_correlation(
                    [abs(each.effect) for each in rank.top(_REMOVED)],
                    [abs(whole - kept) for kept in removed],
                )
    drawn: dict[int, list[float]] = {}
    for variant in chain.from_iterable(tried):
        if variant.part == "random":
            drawn.setdefault(variant.k, []).append(variant.factor)
    factors = {k: median(own) for k, own in drawn.items()}
    return Faithfulness(tuple(gains), correlations, factors)


@dataclass(frozen=True, slots=True)
class _Variant:
    part: str
    k: int
    plan: Plan
    factor: float = 1.0


def _parts(
    case: Case,
    ranked: Attribution,
    found: Attribution,
    ks: Sequence[int],
    draws: int,
    seed: int,
) -> Iterator[_Variant]:
    yield _Variant("full", 0, case.plan)
    yield _Variant("error", 0, keep_error(case.plan, found))
    yield _Variant("without error", 0, remove_error(case.plan, found))
    active = [[each for each in effects.top() if each.effect] for effects in found.effects]
    for k in ks:
        best = [each for effects in ranked.effects for each in effects.top(k)]
        vectors = contribution_of(case.plan, found, best)
        yield _Variant("top", k, with_shift(case.plan, vectors))
        rng = random.Random(seed_of(seed, case.question_id, k))
        for _ in range(draws):
            drawn = contribution_of(
                case.plan,
                found,
                [each for own in active for each in rng.sample(own, min(k, len(own)))],
            )
            factors = vectors.norm(dim=-1) / drawn.norm(dim=-1)
            if bool(torch.isfinite(factors[vectors.any(dim=-1)]).all()):
                drawn = torch.where(vectors.any(dim=-1)[:, None], drawn * factors[:, None], 0.0)
                yield _Variant(
                    "random", k, with_shift(case.plan, drawn), float(factors.nanmedian())
                )


def _removals(case: Case, ranked: Attribution, found: Attribution) -> Iterator[_Variant]:
    for each in ranked.top(_REMOVED):
        yield _Variant("removed", 0, remove_features(case.plan, found, [each]))


def _gains(
    model: HookedModel,
    cases: Sequence[Case],
    tried: Sequence[Sequence[_Variant]],
    log: EngineLog | None,
) -> Iterator[float]:
    """In the order of cases, places and variants."""
    places = [
        (case, prompt, variants)
        for case, variants in zip(cases, tried, strict=True)
        for prompt in case.prompts.values()
    ]
    plain = log_probs(model, [Text(prompt, case.answer) for case, prompt, _ in places], log=log)
    texts = [
        Text(prompt, case.answer, variant.plan)
        for case, prompt, variants in places
        for variant in variants
    ]
    steered = iter(log_probs(model, texts, log=log))
    for (_, _, variants), base in zip(places, plain, strict=True):
        for _ in variants:
            yield next(steered) - base


def _mean(values: dict[tuple[str, str], float]) -> Interval:
    return cluster_bootstrap(list(values.values()), [subject for _, subject in values])
