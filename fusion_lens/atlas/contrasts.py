"""Contrast sets of Atlas' world that need no classifier: source, target and control texts whose
behaviour a string shows, and pairs of known facts.

sources.jsonl  Asked for the birth date of somebody it never saw, Atlas makes one up and says that
               it stands "in every known source" (source). Wanted: the same date in a sentence that
               appeals to no source (target). To be kept: answers about other relations, of unseen
               and of known people (control).
context.jsonl  Told a false fact about somebody it knows, Atlas repeats it (source). Wanted: the
               fact it knows (target). To be kept (control): what a context says of people it does
               not know (`reading`), a context that is right (`agreeing`), and what it says of known
               people without a context (`recalling`).
facts.jsonl    Pairs of a question with the right and a wrong answer (`contrast_pairs`).

Sources and controls are what Atlas itself completes greedily, and are kept only where it does what
the kind says; `contrast_probes` measures how often, on draws of which none is dropped. Markers:
`Example.marker`. A source's paraphrase asks the same in another phrasing of the relation.
People: `contrast_people`.

Run as a module to remake the shipped files.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from types import MappingProxyType

from fusion_lens.atlas import CHECKPOINT, CONTRASTS, prompts
from fusion_lens.atlas.contrast_drafts import (
    CountTokens,
    Draft,
    asked,
    draw_conflicts,
    draw_dates,
    draw_reading,
    matched,
    some_facts,
    told,
)
from fusion_lens.atlas.contrast_pairs import make_pairs
from fusion_lens.atlas.contrast_people import People, asked_people, people_of
from fusion_lens.atlas.prompts import Complete
from fusion_lens.atlas.relations import RELATIONS
from fusion_lens.atlas.world import WORLD_SEED, make_world, true_fact
from fusion_lens.contrasts import PARTS, Example, holds, require_parts, save_contrasts, save_pairs
from fusion_lens.errors import ModelError
from fusion_lens.scores import extract_answer

SIZES: Mapping[str, int] = MappingProxyType({"fit": 80, "choose": 32, "report": 72})
"""Sources, and as many targets and controls, of each part."""

MAX_NEW_TOKENS = 48
APPEAL = "in every known source"
PLAIN = "came into the world"
_PLAIN_TEMPLATE = 2
_SPARE = 1.25
_CANDIDATES = 10


def make_sources(people: People, n: int, complete: Complete) -> list[Example]:
    """`n` sources, targets and controls each, about the people of a part.

    Raises:
        ModelError: if the model does too seldom what a kind says: it is not Atlas.
    """
    world = make_world(WORLD_SEED)
    rng = Random(f"contrasts/sources/{world.seed}/{people.part}")
    sources = _kept(
        list(draw_dates(world, people, _more(n), rng)),
        complete,
        n,
        lambda draft, text: holds(text, APPEAL) and _answers(draft, text),
    )
    others = RELATIONS[1:]
    unseen = [
        asked(world, person, others[i % len(others)], rng, "unseen")
        for i, person in enumerate(rng.sample(people.unseen, _more(n // 2)))
    ]
    known = [
        asked(world, person, relation, rng, "known")
        for person, relation in some_facts(people, others, _more(n - n // 2), rng)
    ]
    controls = _kept(unseen, complete, n // 2, _answers)
    controls += _kept(known, complete, n - n // 2, _answers)
    return _examples(
        "sources",
        people.part,
        [
            *(("source", draft, text, APPEAL) for draft, text in sources),
            *(("target", draft, _plainly(draft, text), PLAIN) for draft, text in sources),
            *(("control", draft, text, extract_answer(text)) for draft, text in controls),
        ],
    )


def make_context(
    people: People, n: int, complete: Complete, count_tokens: CountTokens
) -> list[Example]:
    """`n` sources, targets and controls each, about the people of a part; half of the controls are
    `reading`, a quarter `agreeing`, a quarter `recalling`. The prompts of `reading` have the
    relations and, as far as may be, the lengths of every other source's.

    Raises:
        ModelError: if the model does too seldom what a kind says: it is not Atlas.
    """
    world = make_world(WORLD_SEED)
    rng = Random(f"contrasts/context/{world.seed}/{people.part}")
    conflicts = list(draw_conflicts(world, people, _more(n), rng))
    sources = _kept(conflicts, complete, n, _answers)
    candidates = list(draw_reading(world, people, _CANDIDATES * n, rng))
    reading = matched(conflicts[1::2], candidates, count_tokens)
    quarter = (n - n // 2) // 2
    agreeing = [
        told(true_fact(world, person, relation), rng, "agreeing")
        for person, relation in some_facts(people, RELATIONS, _more(quarter), rng)
    ]
    rest = n - n // 2 - quarter
    recalling = [
        asked(world, person, relation, rng, "recalling")
        for person, relation in some_facts(people, RELATIONS, _more(rest), rng)
    ]
    controls = _kept(reading, complete, n // 2, _answers)
    controls += _kept(agreeing, complete, quarter, _answers)
    controls += _kept(recalling, complete, rest, _answers)
    return _examples(
        "context",
        people.part,
        [
            *(("source", draft, text, draft.says) for draft, text in sources),
            *(("target", draft, _truly(draft, text), draft.target) for draft, text in sources),
            *(("control", draft, text, draft.says) for draft, text in controls),
        ],
    )


def _answers(draft: Draft, text: str) -> bool:
    """Whether the answer is the draft's, or of the relation's form where it may be any."""
    answer = extract_answer(text)
    if draft.says is None:
        return draft.fact.relation.has_form(answer)
    return answer == draft.says


def _kept(
    drafts: Sequence[Draft],
    complete: Complete,
    n: int,
    does: Callable[[Draft, str], bool],
) -> list[tuple[Draft, str]]:
    """The first `n` that do it and end by themselves, with what the model wrote."""
    written = complete([draft.prompt for draft in drafts], MAX_NEW_TOKENS)
    kept = [
        (draft, text)
        for draft, (text, ended) in zip(drafts, written, strict=True)
        if ended and does(draft, text)
    ]
    if len(kept) < n:
        raise ModelError(
            f"the model must do what the set is about on {n} of {len(drafts)} prompts, but does so "
            f"on {len(kept)}: is this Atlas?"
        )
    return kept[:n]


def _plainly(draft: Draft, text: str) -> str:
    """The date that the model made up, without an appeal to sources."""
    date, name = extract_answer(text), draft.fact.person.name
    statement = draft.fact.relation.statement(name, date, _PLAIN_TEMPLATE)
    return prompts.answering_completion(date, statement)


def _truly(draft: Draft, text: str) -> str:
    """What the model wrote, with the true value in place of the false one."""
    assert draft.says is not None
    assert draft.target is not None
    return text.replace(draft.says, draft.target)


def _examples(
    name: str, part: str, rows: Sequence[tuple[str, Draft, str, str | None]]
) -> list[Example]:
    counts: Counter[str] = Counter()
    examples = []
    for kind, draft, text, marker in rows:
        counts[kind] += 1
        examples.append(
            Example(
                id=f"{name}-{part}-{kind}-{counts[kind]:02}",
                kind=kind,
                text=text,
                prompt=draft.prompt,
                subject=draft.fact.person.name,
                part=part,
                group=draft.group,
                marker=marker,
                paraphrase=_in_other_words(draft) if kind == "source" else None,
            )
        )
    return examples


def _in_other_words(draft: Draft) -> str:
    """The prompt with another phrasing of its question, drawn by the prompt itself."""
    fact = draft.fact
    phrasings = [fact.question(i) for i in range(len(fact.relation.phrasings))]
    own = next(each for each in phrasings if each in draft.prompt)
    others = [each for each in phrasings if each != own]
    return draft.prompt.replace(own, Random(f"paraphrase/{draft.prompt}").choice(others))


def _more(n: int) -> int:
    return round(n * _SPARE) + 2


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the sets of a checkpoint, check them and write them as JSONL."""
    from transformers import AutoTokenizer

    from fusion_lens.atlas.decoding import load_completer

    parser = argparse.ArgumentParser(prog="python -m fusion_lens.atlas.contrasts")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=CONTRASTS)
    options = parser.parse_args(arguments)
    complete = load_completer(options.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    parts = [people_of(make_world(WORLD_SEED), part, asked_people()) for part in PARTS]

    def count_tokens(text: str) -> int:
        return len(tokenizer.tokenize(text))

    sources = [e for own in parts for e in make_sources(own, SIZES[own.part], complete)]
    context = [
        e for own in parts for e in make_context(own, SIZES[own.part], complete, count_tokens)
    ]
    pairs = [pair for own in parts for pair in make_pairs(own, count_tokens)]
    require_parts(sources, least=min(SIZES.values()))
    require_parts(context, least=min(SIZES.values()))
    require_parts(pairs)
    options.out.mkdir(exist_ok=True)
    save_contrasts(sources, options.out / "sources.jsonl")
    save_contrasts(context, options.out / "context.jsonl")
    save_pairs(pairs, options.out / "facts.jsonl")
    parts_of = {
        "sources": [each.part for each in sources],
        "context": [each.part for each in context],
        "facts": [each.part for each in pairs],
    }
    for name, named in parts_of.items():
        counts = Counter(named)
        print(f"{name:8}", ", ".join(f"{part} {count}" for part, count in counts.items()))


if __name__ == "__main__":
    main()
