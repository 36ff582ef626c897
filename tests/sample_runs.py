"""Whole runs made by hand, details included: a small one, a hostile one, one of any size."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from records import LOVELACE, arm, interval, summary

from fusion_lens.details import Detail, FeatureShare, Marked, Trace
from fusion_lens.prompts import Template
from fusion_lens.results import SCHEMA_VERSION, Provenance, Result, Results, Summary

ARMS = (
    *("baseline", "best_of_n", "answer_in_prompt", "full", "segmented"),
    *("generic", "mismatched", "random", "unembed"),
)
TUNED = ARMS[3:]
COEFFS = {"full": {"full": 0.5}, "unembed": {"late": 0.75}}
THIRDS = {"early": 0.25, "middle": 0.5, "late": 1.25}
HOSTILE = (
    "<script>window.pwned=1</script>",
    "<img src=x onerror=window.pwned=1>",
    "</script><script>window.pwned=1</script><!--",
    '"><svg onload=window.pwned=1>',
    '<a href="javascript:window.pwned=1">javascript:window.pwned=1</a>',
    "{{ 7 * 7 }} ${window.pwned=1} %{x} $x^2$ \u2028\x00&lt;b&gt;",
    "constructor",
    "__proto__",
)
WORDS = re.findall(
    r"\w+",
    "the record of a town hall says that it was built in by and for harbour winter carpenter parish"
    " letter stone bridge pupil voyage museum 1876 1902 14 March Aldsen Helsant Quist Varga Oslo",
)


def provenance(**more: Any) -> dict[str, Any]:
    made = Provenance(
        command="fusion-lens run --limit 2 --out 'runs/two words'",
        model="tiny",
        weights_sha256="ab" * 32,
        processing_mode="unprocessed",
        dtype="float32",
        seed=7,
        questions_sha256="cd" * 32,
        settings={
            "arms": list(ARMS),
            "segments": "thirds",
            "tuning": {
                "template": asdict(Template()),
                "generation": {"slots": 64, "cache_length": 96},
                "metrics": "completion",
            },
            "perplexity_model": None,
        },
        versions={"python": "3.11.7", "fusion-lens": "0.1.0", "torch": "2.13.0"},
        threads=1,
    )
    return asdict(made) | more


def run_summary(arms: Sequence[str], n: int, **more: Any) -> Summary:
    steered = {"n_trials": [30, 30], "steered": 1, "zero_won": 0.5, "tied": 0.25, "not_finite": 0}
    contents = {
        name: arm(overlap=interval(0.0625 * (i + 1), 0.0, 0.75)) | {"n": n}
        for i, name in enumerate(arms)
    }
    for name in set(arms) & set(TUNED):
        contents[name] |= steered | {"coeffs_median": COEFFS.get(name, THIRDS)}
    made = summary(**contents) | {
        "schema_version": SCHEMA_VERSION,
        "provenance": provenance(),
        "questions": {"n": n, "file": "file.jsonl", "split": "test", "available": 2 * n},
        "generic_share": {"median": 0.5, "n": n},
    }
    return Summary(made | more)


def record(question_id: str, name: str, **more: Any) -> Result:
    made = replace(LOVELACE, question_id=question_id, arm=name)
    if name in TUNED:
        chosen = {"coeffs": COEFFS.get(name, THIRDS), "zero_won": False, "tied": False}
        made = replace(made, injected_norm=12.5, n_trials=30, **chosen)
    return replace(made, **more)


def detail(question_id: str, tokens: Sequence[str] = (), arms: Sequence[str] = TUNED) -> Detail:
    tokens = tuple(tokens) or ("<s>", "\n", " Ada", " Lovelace", ".")
    half = tuple(-0.5 * i for i in range(len(tokens)))
    return Detail(
        question_id=question_id,
        delta_norms=(1.0, 2.0, 3.0, 4.5),
        base_norms=(2.0, 2.0, 0.0, 3.0),
        generic_share=(0.5, 0.25, 0.75, 0.125),
        captured=Marked(tokens, tuple(range(1, len(tokens)))),
        steered=Marked(tokens[:3], (1, 2)),
        traces=tuple(Trace(name, tokens, half, (-0.25,) * len(tokens)) for name in arms),
        features=(
            FeatureShare(2, 17, 4.5, 0.25, "before a name"),
            FeatureShare(None, 18, -1.5, None, ""),
        ),
        features_of="segmented",
    )


def small_run() -> Results:
    """Three questions under three arms: the first steered, the second with the zero plan, the third
    without details and with a failed arm."""
    right = {"exact_match": 1.0, "label": "CORRECT", "judged": "holds the gold answer"}
    harris = {"question": "Who is Tom?", "answer": "José Harris", "topic": "People"}
    quist = {"question": "Where is Quist?", "answer": "Oslo"}
    zero = {"zero_won": True, "injected_norm": 0.0, **harris}
    records = (
        record("lovelace", "baseline"),
        record("lovelace", "full", completion="Ada Lovelace. He wrote it.", objective=0.5, **right),
        record("lovelace", "segmented", completion="Ada wrote\nthe book.", overlap=0.5),
        record("harris", "baseline", **harris),
        record("harris", "full", coeffs={"full": 0.0}, **zero),
        record("harris", "segmented", coeffs=dict.fromkeys(THIRDS, 0.0), perplexity=None, **zero),
        record("quist", "baseline", overlap=0.75, **quist),
        record("quist", "segmented", completion="In Oslo.", objective=-0.5, **quist, **right),
    )
    failure = {"question_id": "quist", "arm": "full", "error": "SpanError", "message": "too long."}
    made = run_summary(("baseline", "full", "segmented"), 3, failures=[failure])
    empty = replace(detail("harris", arms=()), features=(), features_of=None, generic_share=None)
    return Results(records, made, (detail("lovelace", arms=("full", "segmented")), empty))


def empty_run() -> Results:
    """Interrupted before the first question was done."""
    return Results((), run_summary((), 0, interrupted=True))


def hostile_run() -> Results:
    """Every text that a model, a question file or a dictionary may hold tries to run a script."""
    records, details = [], []
    for i, text in enumerate(HOSTILE):
        texts = {
            "question": f"{i} {text}",
            "answer": text,
            "explanation": text,
            "subject": text,
            "topic": text,
            "answer_type": text,
            "extracted": text,
            "judged": text,
        }
        for name in ("baseline", "segmented"):
            donor = text if name == "segmented" else None
            records.append(record(text, name, completion=f"{name} {text}", donor=donor, **texts))
        shares = (FeatureShare(0, 1, 1.0, 0.5, text),)
        details.append(replace(detail(text, ("<s>", text, f" {text}")), features=shares))
    failure = {"question_id": HOSTILE[0], "arm": None, "error": "E", "message": HOSTILE[1]}
    made = run_summary(
        ("baseline", "segmented"),
        len(HOSTILE),
        failures=[failure],
        groups={"topic": {HOSTILE[2]: {"segmented": arm()["metrics"]}}},
        judge={"name": HOSTILE[3], "grade": False},
        provenance=provenance(command=HOSTILE[0], model=HOSTILE[1]),
    )
    return Results(tuple(records), made, tuple(details))


def large_run(n: int = 1000, n_layers: int = 26, n_tokens: int = 48) -> Results:
    """As long as a real run: all arms, completions of 48 tokens, numbers without a pattern."""
    draw = random.Random(0)

    def words(k: int) -> tuple[str, ...]:
        return tuple(f" {draw.choice(WORDS)}{draw.randrange(100)}" for _ in range(k))

    def number() -> float:
        return float(f"{draw.lognormvariate(0, 1):.5g}")

    records, details = [], []
    for i in range(n):
        name = f"test-{i:04d}"
        question, gold, explanation = words(14), words(3), words(24)
        texts = {
            "question": f"Question {i}{''.join(question)}?",
            "answer": "".join(gold).strip(),
            "explanation": "".join(explanation),
            "topic": draw.choice(WORDS),
        }
        traces = []
        for each in ARMS:
            said = words(n_tokens)
            scores = dict.fromkeys(("objective", "nll", "overlap", "margin", "seconds"), 0.0)
            scores = {key: draw.random() for key in scores}
            coeffs = {key: draw.random() for key in record(name, each).coeffs}
            more = texts | scores | {"perplexity": number(), "exact_match": float(i % 4 == 0)}
            records.append(record(name, each, completion="".join(said), coeffs=coeffs, **more))
            if each in TUNED:
                steered, before = ([-number() for _ in said] for _ in range(2))
                traces.append(Trace(each, said, tuple(steered), tuple(before)))
        reference = ("<s>", *question, *gold, *explanation)
        details.append(
            Detail(
                question_id=name,
                delta_norms=tuple(number() * (layer + 1) for layer in range(n_layers)),
                base_norms=tuple(number() * (layer + 1) for layer in range(n_layers)),
                generic_share=tuple(draw.random() for _ in range(n_layers)),
                captured=Marked(reference, tuple(range(15, len(reference)))),
                steered=Marked(("<s>", *question), tuple(range(1, 15))),
                traces=tuple(traces),
                features=tuple(
                    FeatureShare(draw.randrange(n_layers), draw.randrange(65536), number(), 0.01, e)
                    for e in words(10)
                ),
                features_of="segmented",
            )
        )
    return Results(tuple(records), run_summary(ARMS, n), tuple(details))
