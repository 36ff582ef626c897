"""What one question's arms chose -> its `Detail`: the completions token by token, steered and not,
and what the method's plan is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fusion_lens.arms import Bench, Chosen
from fusion_lens.attribution import FeatureEffect
from fusion_lens.details import Detail, FeatureShare, Marked, Trace
from fusion_lens.engine_log import EngineLog
from fusion_lens.models import HookedModel, token_texts
from fusion_lens.plans import Plan
from fusion_lens.preparation import Prepared
from fusion_lens.teacher_forcing import Text, token_log_probs

Explain = Callable[[Sequence[Text]], Sequence[Sequence[FeatureEffect]]]
"""Texts under their plans -> the features that each plan injects, the largest first."""

_EXPLAINED = ("segmented", "full")
_TEXTS_AT_ONCE = 8


def captured_tokens(model: HookedModel, prepared: Prepared) -> Marked:
    """The reference text, marked where its mean is taken."""
    reference = prepared.reference
    return Marked(token_texts(model, reference.tokens), reference.pooled)


def steered_tokens(model: HookedModel, prepared: Prepared, plan: Plan | None) -> Marked:
    """The steered prompt, marked where the plan injects."""
    prompt = prepared.prompt
    positions = () if plan is None else plan.steered_positions(prompt.layout)
    return Marked(token_texts(model, prompt.tokens), positions)


def traces_of(
    model: HookedModel,
    texts: Sequence[tuple[str, Text]],
    *,
    executor: str = "auto",
    log: EngineLog | None = None,
) -> list[Trace | None]:
    """What was written, token by token, under each text's plan and without it; named as given
    (an arm). None where a log-probability is not finite.

    Raises:
        PlanError: if a plan belongs to another model, or recomputes its mean.
        SpanError: if a text has nothing written.
    """
    both = [*(text for _, text in texts), *(replace(text, plan=None) for _, text in texts)]
    read = token_log_probs(model, both, executor=executor, log=log)
    traces: list[Trace | None] = []
    for (name, text), steered, unsteered in zip(texts, read, read[len(texts) :], strict=False):
        finite = all(map(math.isfinite, (*steered, *unsteered)))
        tokens = token_texts(model, text.tokens)[len(text.prompt.tokens) :]
        trace = Trace(name, tokens, _rounded(steered), _rounded(unsteered))
        traces.append(trace if finite else None)
    return traces


def details_of(
    bench: Bench,
    prepared: Sequence[Prepared],
    chosen: Sequence[Chosen],
    explain: Explain | None = None,
) -> list[Detail]:
    """One `Detail` for each prepared question. Plans that inject nothing, or that cannot be read
    teacher-forced, have no trace."""
    read = [
        (each, Text(each.prepared.prompt, each.graded.completion.tokens, each.plan))
        for each in chosen
        if each.plan is not None
        and not each.plan.needs_sequence
        and each.graded.completion.finite
        and each.graded.completion.tokens
    ]
    traces: dict[str, list[Trace]] = {}
    found = traces_of(
        bench.model,
        [(each.arm, text) for each, text in read],
        executor=bench.config.generation.executor,
        log=bench.log,
    )
    for (each, _), trace in zip(read, found, strict=True):
        if trace is not None:
            traces.setdefault(each.prepared.question.id, []).append(trace)
    explained: dict[str, tuple[str, Text]] = {}
    for arm in _EXPLAINED:
        for each, text in read:
            if each.arm == arm:
                explained.setdefault(each.prepared.question.id, (arm, text))
    features = {} if explain is None else _features(explain, explained)
    planned = {each.prepared.question.id: each.plan for each in chosen if each.plan is not None}
    made = []
    for item in prepared:
        name = item.question.id
        share = bench.lenders.share(item)
        own_features = features.get(name, ())
        made.append(
            Detail(
                question_id=name,
                delta_norms=_rounded(item.deltas.norms.tolist()),
                base_norms=_rounded(item.deltas.base.norm(dim=-1).tolist()),
                generic_share=None if share is None else _rounded(share.tolist()),
                captured=captured_tokens(bench.model, item),
                steered=steered_tokens(bench.model, item, planned.get(name)),
                traces=tuple(traces.get(name, ())),
                features=own_features,
                features_of=explained[name][0] if own_features else None,
            )
        )
    return made


def _features(
    explain: Explain, texts: Mapping[str, tuple[str, Text]]
) -> dict[str, tuple[FeatureShare, ...]]:
    names = list(texts)
    found: dict[str, tuple[FeatureShare, ...]] = {}
    for start in range(0, len(names), _TEXTS_AT_ONCE):
        some = names[start : start + _TEXTS_AT_ONCE]
        effects = explain([texts[name][1] for name in some])
        found |= {name: tuple(map(_share, own)) for name, own in zip(some, effects, strict=True)}
    return found


def _share(each: FeatureEffect) -> FeatureShare:
    share = None if each.share is None else _round(each.share)
    return FeatureShare(each.layer, each.feature, _round(each.effect), share, each.label)


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(map(_round, values))


def _round(value: float) -> float:
    """Five significant digits: pictures are made of these, no test."""
    return float(f"{value:.5g}")
