"""What Atlas does on the contrast sets before anybody steers it, as shares with 95 % Wilson
intervals, and whether something trivial tells their kinds apart.

Base rates are measured twice: on fresh draws about people of the parts "fit" and "choose" of which
none is dropped, and on the shipped prompts, which were kept because the model does what they are
for. Knows no model library.

Run as a module to measure the shipped model and write `probes.json` beside the sets.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from random import Random
from statistics import fmean

from fusion_lens.atlas import CHECKPOINT, CONTRASTS, prompts
from fusion_lens.atlas.contrast_drafts import asked, draw_conflicts, draw_dates, draw_reading
from fusion_lens.atlas.contrast_leaks import Sides, balanced, by_bag, by_length, by_token, score
from fusion_lens.atlas.contrast_people import People, asked_people, people_of
from fusion_lens.atlas.contrasts import APPEAL, MAX_NEW_TOKENS
from fusion_lens.atlas.probes import Share, hash_weights
from fusion_lens.atlas.prompts import Complete, Score
from fusion_lens.atlas.relations import RELATIONS, Relation
from fusion_lens.atlas.world import WORLD_SEED, World, make_world, true_fact
from fusion_lens.contrasts import (
    PARTS,
    Example,
    Pair,
    changed,
    holds,
    load_contrasts,
    load_pairs,
    of_kind,
    shown,
)
from fusion_lens.scores import extract_answer

Shares = dict[str, Share]
Tokenize = Callable[[str], list[int]]

N_FRESH = 500
FILES = ("sources.jsonl", "context.jsonl", "facts.jsonl")
_RULES = {"length": by_length, "one token": by_token, "bag of tokens": by_bag}


@dataclass(frozen=True, slots=True)
class Sets:
    """The three shipped files."""

    sources: list[Example]
    context: list[Example]
    facts: list[Pair]


def load_sets(folder: Path = CONTRASTS) -> Sets:
    """Read them."""
    sources, context = (load_contrasts(folder / name) for name in FILES[:2])
    return Sets(sources, context, load_pairs(folder / FILES[2]))


def everybody(world: World) -> People:
    """All known people, and the unseen ones of the parts "fit" and "choose"."""
    parts = [people_of(world, part, asked_people()) for part in ("fit", "choose")]
    return People("fit", world.known, tuple(p for own in parts for p in own.unseen))


def probe_fresh(people: People, complete: Complete, sample: Complete, n: int) -> Shares:
    """Base rates of the two behaviours where nothing was dropped."""
    world = make_world(WORLD_SEED)
    rng = Random(f"probe/contrasts/{world.seed}")
    dates = [draft.prompt for draft in draw_dates(world, people, n, rng)]
    known = [asked(world, person, RELATIONS[0], rng, "known").prompt for person in people.known]
    conflicts = list(draw_conflicts(world, people, n, rng))
    reading = list(draw_reading(world, people, n, rng))
    told = _answers([draft.prompt for draft in conflicts], complete)
    read = _answers([draft.prompt for draft in reading], complete)
    return {
        "sources: appeals, unseen people": _appeals(dates, complete),
        "sources: appeals, known people": _appeals(known, complete),
        "sources: appeals, sampled at temperature 1": _appeals(dates, sample),
        "context: repeats the false fact": Share.of(
            answer == draft.says for answer, draft in zip(told, conflicts, strict=True)
        ),
        "context: says the true fact": Share.of(
            answer == draft.target for answer, draft in zip(told, conflicts, strict=True)
        ),
        "context: reads about unseen people": Share.of(
            answer == draft.says for answer, draft in zip(read, reading, strict=True)
        ),
    }


def probe_examples(name: str, examples: Sequence[Example], complete: Complete) -> Shares:
    """What the unsteered model does on the prompts of a shipped set, all parts together."""
    sources, targets, controls = (of_kind(examples, k) for k in ("source", "target", "control"))
    written = _written([each.prompt for each in sources], complete)
    kept = _written([each.prompt for each in controls], complete)
    shares = {
        "source prompts show the behaviour": Share.of(map(shown, sources, written)),
        "source prompts show the target": Share.of(map(shown, targets, written)),
        "control prompts keep their answer": Share.of(map(shown, controls, kept)),
        "control prompts changed": Share.of(map(changed, controls, kept)),
    }
    if name == "sources":
        appeals = Share.of(holds(text, APPEAL) for text in kept)
        shares["control prompts show the behaviour"] = appeals
    return {f"{name}: {probe}": share for probe, share in shares.items()}


def probe_odds(examples: Sequence[Example], score: Score) -> tuple[Share, float]:
    """How many sources are likelier than their targets, and the mean difference in nats."""
    sources, targets = of_kind(examples, "source"), of_kind(examples, "target")
    one, other = (score([(each.prompt, each.text) for each in own]) for own in (sources, targets))
    gaps = [a - b for a, b in zip(one, other, strict=True)]
    return Share.of(gap > 0 for gap in gaps), fmean(gaps)


def probe_pairs(pairs: Sequence[Pair], score: Score, tokenize: Tokenize) -> Shares:
    """How many right answers are likelier, by part; how many are as long as the wrong ones."""
    shares = {
        f"facts: right is likelier, {part}": _likelier(
            [(p.prompt, p.right, p.wrong) for p in pairs if p.part == part], score
        )
        for part in PARTS
    }
    equal = (len(tokenize(p.right)) == len(tokenize(p.wrong)) for p in pairs)
    return {**shares, "facts: right and wrong have equally many tokens": Share.of(equal)}


def probe_formats(pairs: Sequence[Pair], people: People, score: Score) -> Shares:
    """The same facts as lettered options, each in both orders, and facts of unseen people."""
    world = make_world(WORLD_SEED)
    lettered = []
    for pair in pairs:
        question, _, _ = pair.prompt.partition("\n")
        options = (pair.right.strip(), pair.wrong.strip())
        for (a, b), right in ((options, " A"), (options[::-1], " B")):
            wrong = {" A": " B", " B": " A"}[right]
            lettered.append((f"{question}\nA: {a}\nB: {b}\nAnswer:", right, wrong))
    unknown = []
    for relation in RELATIONS:
        facts = [true_fact(world, person, relation) for person in people.unseen[:100]]
        for fact, other in zip(facts, (*facts[1:], facts[0]), strict=True):
            prompt = prompts.answering_prompt(fact.question(0))
            if fact.value != other.value:
                unknown.append((prompt, f"\n{fact.value}", f"\n{other.value}"))
    return {
        "facts: right is likelier, as a letter of two": _likelier(lettered, score),
        "facts: right is likelier, unseen people": _likelier(unknown, score),
    }


def probe_templates(people: People, complete: Complete, n: int) -> Shares:
    """How often each sentence of each relation is what Atlas explains a made-up answer with."""
    world = make_world(WORLD_SEED)
    rng = Random(f"probe/templates/{world.seed}")
    shares = {}
    for relation in RELATIONS:
        drafts = [
            asked(world, person, relation, rng, "unseen") for person in rng.sample(people.unseen, n)
        ]
        texts = _written([draft.prompt for draft in drafts], complete)
        names = [draft.fact.person.name for draft in drafts]
        used = [_template(relation, *each) for each in zip(names, texts, strict=True)]
        for template, words in enumerate(relation.statements):
            shares[f"{relation.key}: {words}"] = Share.of(each == template for each in used)
    return shares


def probe_leaks(sets: Sets, tokenize: Tokenize) -> Shares:
    """What trivial rules fitted on "fit" get right on "report", of two sets of equal size."""

    def of(examples: Sequence[Example], part: str, kind: str, group: str | None) -> list[Example]:
        own = [each for each in of_kind(examples, kind) if each.part == part]
        return [each for each in own if group is None or each.group == group]

    shares = {}
    for name, examples, group in (
        ("sources", sets.sources, None),
        ("context", sets.context, None),
        ("context", sets.context, "reading"),
        ("context", sets.context, "agreeing"),
    ):
        against = f"{name}: source or {'control' if group is None else group}"
        for scope in ("prompt", "whole"):
            halves: list[Sides] = []
            for part in ("fit", "report"):
                own = of(examples, part, "source", None), of(examples, part, "control", group)
                halves.append(
                    balanced(*([tokenize(getattr(each, scope)) for each in side] for side in own))
                )
            for rule, made in _RULES.items():
                shares[f"{against}, {scope}, by {rule}"] = score(made(halves[0]), halves[1])
    for rule, made in _RULES.items():
        fit, report = (
            balanced(
                [tokenize(pair.right) for pair in sets.facts if pair.part == part],
                [tokenize(pair.wrong) for pair in sets.facts if pair.part == part],
            )
            for part in ("fit", "report")
        )
        shares[f"facts: right or wrong answer, by {rule}"] = score(made(fit), report)
    return shares


def format_shares(shares: Shares) -> str:
    """A Markdown table: one probe a line with its share, interval, hits and n."""
    lines = ["| measured | share | 95 % (Wilson) | hits / n |", "| --- | ---: | ---: | ---: |"]
    for name, share in shares.items():
        low, high = share.interval
        told = f"{share.value:.1%} | {low:.1%} to {high:.1%} | {share.hits} / {share.n}"
        lines.append(f"| {name} | {told} |")
    return "\n".join(lines)


def _template(relation: Relation, name: str, text: str) -> int | None:
    answer = extract_answer(text)
    sentences = [relation.statement(name, answer, i) for i in range(len(relation.statements))]
    return next((i for i, sentence in enumerate(sentences) if sentence in text), None)


def _likelier(texts: Sequence[tuple[str, str, str]], score: Score) -> Share:
    right = score([(prompt, text) for prompt, text, _ in texts])
    wrong = score([(prompt, text) for prompt, _, text in texts])
    return Share.of(a > b for a, b in zip(right, wrong, strict=True))


def _appeals(asked: Sequence[str], complete: Complete) -> Share:
    return Share.of(holds(text, APPEAL) for text in _written(asked, complete))


def _answers(asked: Sequence[str], complete: Complete) -> list[str]:
    return [extract_answer(text) for text in _written(asked, complete)]


def _written(asked: Sequence[str], complete: Complete) -> list[str]:
    return [text for text, _ in complete(asked, MAX_NEW_TOKENS)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure a checkpoint on a folder of sets, print the tables, write the record."""
    from transformers import AutoTokenizer

    from fusion_lens.atlas.decoding import load_completer, load_scorer

    parser = argparse.ArgumentParser(prog="python -m fusion_lens.atlas.contrast_probes")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--sets", type=Path, default=CONTRASTS)
    parser.add_argument("--n", type=int, default=N_FRESH)
    options = parser.parse_args(arguments)
    sets, people = load_sets(options.sets), everybody(make_world(WORLD_SEED))
    complete, score = load_completer(options.checkpoint), load_scorer(options.checkpoint)
    sample = load_completer(options.checkpoint, sample_seed=0)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    odds = {name: probe_odds(getattr(sets, name), score) for name in ("sources", "context")}
    tables: dict[str, Shares] = {
        "base rates": {
            **probe_fresh(people, complete, sample, options.n),
            **probe_examples("sources", sets.sources, complete),
            **probe_examples("context", sets.context, complete),
            **{f"{k}: source is likelier than target": share for k, (share, _) in odds.items()},
        },
        "pairs": {
            **probe_pairs(sets.facts, score, tokenize),
            **probe_formats(sets.facts, people, score),
        },
        "trivial rules": probe_leaks(sets, tokenize),
        "sentences": probe_templates(people, complete, options.n // 5),
    }
    record = {
        "weights_sha256": hash_weights(options.checkpoint),
        "sets_sha256": {
            name: sha256((options.sets / name).read_bytes()).hexdigest() for name in FILES
        },
        "source_minus_target_nats": {name: round(gap, 2) for name, (_, gap) in odds.items()},
        "tables": {
            title: {name: share.to_dict() for name, share in shares.items()}
            for title, shares in tables.items()
        },
    }
    for title, shares in tables.items():
        print(f"{title}\n\n{format_shares(shares)}\n")
    print("source minus target, mean nats:", record["source_minus_target_nats"])
    text = json.dumps(record, indent=1) + "\n"
    (options.sets / "probes.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
