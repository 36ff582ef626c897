from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fusion_lens.atlas import CONTRASTS
from fusion_lens.behaviours import UNSTEERED, Behaviour, Observed
from fusion_lens.contrasts import KINDS, PARTS, Example, load_contrasts
from fusion_lens.divergence import kl_unrelated
from fusion_lens.errors import ConfigError, ContrastError
from fusion_lens.fronts import Sweep, matched
from fusion_lens.method_bench import MethodBench, Point, compare_methods
from fusion_lens.method_suite import Line, Suite
from fusion_lens.models import HookedModel
from fusion_lens.prompts import tokenize
from fusion_lens.statistics import cluster_bootstrap

pytestmark = pytest.mark.slow

TOKENS, UNITS = 10, (1, 100)
METHODS, GATE = ("generic", "generic_masked"), "generic + dsas gate"
ALL = load_contrasts(CONTRASTS / "sources.jsonl")
UNRELATED = "The harbour is quiet in winter, and so is the old mill."


def by_date(example: Example) -> Example:
    """With the date it tells as what shows it: it stands in the first line, so that few tokens are
    enough."""
    if example.kind == "control":
        return example
    return replace(example, marker=example.text.strip().split("\n")[0])


def ten(part: str, kind: str, start: int = 0) -> list[Example]:
    """Ten texts, two of the report about one subject."""
    own = [each for each in ALL if (each.part, each.kind) == (part, kind)][start : start + 10]
    if part == "report":
        own = [replace(each, subject=f"r{n // 2}") for n, each in enumerate(own)]
    return [by_date(each) for each in own]


def of_parts(start: int = 0) -> list[Example]:
    """Ten of every part and kind; those of the report from a place on."""
    return [
        example
        for part in PARTS
        for kind in KINDS
        for example in ten(part, kind, start if part == "report" else 0)
    ]


EXAMPLES = of_parts()
CHOOSE = [each for each in EXAMPLES if each.part == "choose"]


@pytest.fixture(scope="module")
def calls() -> list[tuple[str, int, int]]:
    return []


@pytest.fixture(scope="module")
def bench(atlas: HookedModel, calls: list[tuple[str, int, int]]) -> MethodBench:
    def progress(what: str, done: int, total: int) -> None:
        calls.append((what, done, total))

    return compare_methods(
        atlas,
        EXAMPLES,
        methods=METHODS,
        units=UNITS,
        unrelated=[tokenize(atlas, UNRELATED)],
        max_new_tokens=TOKENS,
        seed=3,
        progress=progress,
    )


@pytest.fixture(scope="module")
def suite(atlas: HookedModel) -> Suite:
    fit = [each for each in EXAMPLES if each.part == "fit"]
    return Suite(atlas, fit, units=UNITS, seed=3)


def at_strengths(bench: MethodBench, name: str) -> list[Point]:
    return [point for point in bench.points if point.name == name]


def mean(values: Sequence[float | None]) -> float:
    scored = [value for value in values if value is not None]
    return sum(scored) / len(scored)


def scores(observed: Sequence[Observed]) -> list[float]:
    """Harmonic means, by hand."""
    both = [(mean(own.effect), mean(own.kept)) for own in observed]
    return [2 / (1 / effect + 1 / kept) if effect and kept else 0.0 for effect, kept in both]


def test_what_is_chosen_is_best_on_the_texts_to_choose_on(
    atlas: HookedModel, suite: Suite, bench: MethodBench
) -> None:
    choose = Behaviour(atlas, CHOOSE, max_new_tokens=TOKENS)

    def found(line: Line) -> list[float]:
        return scores(choose.observe(line.ways, paraphrased=False, likelihood=False))

    (generic,) = suite.lines("generic", CHOOSE)
    gated = suite.gated_line(generic, "dsas")
    assert gated is not None
    for line in (generic, gated):
        own = found(line)
        # of equal ones the weaker
        assert bench.line(line.name).chosen == own.index(max(own))
    masked = {line.variant: found(line) for line in suite.lines("generic_masked", CHOOSE)}
    best = max(masked, key=lambda variant: max(masked[variant]))
    chosen = bench.line("generic_masked")
    assert chosen.line.variant == best
    assert chosen.chosen == masked[best].index(max(masked[best]))
    assert bench.line("generic_masked + dsas gate").line.variant == best


def test_the_texts_to_report_have_no_say_in_what_is_chosen(
    atlas: HookedModel, bench: MethodBench
) -> None:
    # they would have chosen another strength for some line
    reported = {own.line.name: scores(own.observed) for own in bench.reported[1:]}
    assert any(own.index(max(own)) != bench.line(name).chosen for name, own in reported.items()), (
        reported
    )
    generic = bench.line("generic")
    other = compare_methods(
        atlas, of_parts(10), methods=METHODS[:1], gates=(), max_new_tokens=TOKENS, progress=False
    )
    assert other.line("generic").observed != generic.observed
    assert other.line("generic").chosen == generic.chosen


def test_every_strength_of_every_line_is_a_point(bench: MethodBench) -> None:
    names = [own.line.name for own in bench.reported]
    masked = ["generic_masked", "generic_masked + dsas gate"]
    assert names == ["unsteered", "generic", GATE, *masked]
    assert [point.name for point in bench.points] == ["unsteered"] + [
        name for name in names[1:] for _ in range(6)
    ]
    for own in bench.reported:
        points = at_strengths(bench, own.line.name)
        assert tuple(point.strength for point in points) == own.line.strengths
        assert [point.chosen for point in points].index(True) == own.chosen
        assert sum(point.chosen for point in points) == 1
        assert {point.variant for point in points} == {own.line.variant}
        assert {point.n_scalars for point in points} == {own.line.n_scalars}
        assert all(
            point.seconds == pytest.approx(own.line.seconds + own.seconds / len(points), abs=1e-3)
            for point in points
        )


def test_the_unsteered_model_is_the_first_point(bench: MethodBench) -> None:
    first = bench.points[0]
    assert bench.reported[0].line.ways == (UNSTEERED,)
    assert (first.name, first.strength, first.n_scalars) == ("unsteered", 0, 0)
    assert (first.effect, first.transfer, first.specificity) == (0.0, 0.0, 1.0)
    # the target tells the date that the unsteered model tells
    assert first.wanted == 1.0


def test_means_and_intervals_are_those_of_the_texts(bench: MethodBench) -> None:
    assert bench.of_sources == bench.of_controls == tuple(f"r{n // 2}" for n in range(10))
    for own in bench.reported:
        for point, seen in zip(at_strengths(bench, own.line.name), own.observed, strict=True):
            effect = cluster_bootstrap(seen.effect, bench.of_sources, seed=3, share=True)
            kept = cluster_bootstrap(seen.kept, bench.of_controls, seed=3, share=True)
            assert (point.effect, point.low, point.high) == (effect.mean, effect.low, effect.high)
            assert point.n == effect.n == 10
            shown = (point.specificity, point.specificity_low, point.specificity_high)
            assert shown == (kept.mean, kept.low, kept.high)
            for name in ("wanted", "transfer", "nll", "marked"):
                assert getattr(point, name) == pytest.approx(mean(getattr(seen, name)))
    shares = {point.effect for point in bench.points}
    assert len(shares) > 4


def test_divergence_is_that_of_each_strength_on_unrelated_text(
    atlas: HookedModel, bench: MethodBench
) -> None:
    own = bench.line("generic")
    plans = [way.plans[0] for way in own.line.ways]
    expected = kl_unrelated(atlas, [tokenize(atlas, UNRELATED)], plans)
    found = [point.kl for point in at_strengths(bench, "generic")]
    assert found == pytest.approx(expected)
    assert found[0] < found[3]
    # a way without a plan of its own has none
    assert bench.points[0].kl is None


def test_what_acts_on_prompts_alone_has_no_divergence(atlas: HookedModel) -> None:
    made = compare_methods(
        atlas,
        EXAMPLES,
        methods=("act_add",),
        gates=(),
        unrelated=[tokenize(atlas, UNRELATED)],
        max_new_tokens=TOKENS,
        progress=False,
    )
    assert {(point.method, point.kl) for point in made.points} == {
        ("unsteered", None),
        ("act_add", None),
    }


def test_methods_are_matched_at_equal_effect(bench: MethodBench) -> None:
    gated, bare = bench.line(GATE), bench.line("generic")
    assert gated.sweep == Sweep(
        tuple(own.effect for own in gated.observed), tuple(own.kept for own in gated.observed)
    )
    found = bench.matched(GATE, "generic", (0.5, 0.75))
    expected = matched(
        gated.sweep, bare.sweep, bench.of_sources, bench.of_controls, (0.5, 0.75), seed=3
    )
    assert found == expected
    assert [at.level for at in found] == [0.5, 0.75]
    assert found[1].diff is not None
    assert found[1].diff != 0.0
    assert [at.level for at in bench.matched(GATE, "generic")] == [0.25, 0.5, 0.75]
    with pytest.raises(ConfigError, match=r"a line must be one of unsteered, generic, .* 'caa'"):
        bench.matched("generic", "caa")


def test_records_are_written_as_json(bench: MethodBench, tmp_path: Path) -> None:
    bench.write(tmp_path / "bench.json")
    records = json.loads((tmp_path / "bench.json").read_text("utf-8"))
    assert records == bench.to_json() == [asdict(point) for point in bench.points]
    keys = {"method", "strength", "effect", "nll", "transfer", "specificity", "n_scalars"}
    assert keys | {"seconds", "n", "low", "high"} <= records[0].keys()
    assert {(each["method"], each["gate"]) for each in records} == {
        ("unsteered", ""),
        *((method, gate) for method in METHODS for gate in ("", "dsas")),
    }


def test_the_table_has_a_row_of_every_line_as_it_was_chosen(bench: MethodBench) -> None:
    table = bench.table()
    names = [own.line.name for own in bench.reported]
    rows = {
        name: dict(zip(table.header, row, strict=True))
        for name, row in zip(names, table.rows, strict=True)
    }
    for own in bench.reported:
        (point,) = (each for each in at_strengths(bench, own.line.name) if each.chosen)
        row = rows[own.line.name]
        parts = (own.line.name, point.variant, f"{point.strength:g}")
        told = ", ".join(part for part in parts if part not in ("", "0"))
        assert row["method"] == told
        low, high = (f"{100 * bound:.0f}" for bound in (point.low, point.high))
        assert row["effect, %"] == f"{100 * point.effect:.0f} [{low}, {high}]"
        assert row["kept, %"].startswith(f"{100 * point.specificity:.0f} [")
        assert row["scalars"] == f"{point.n_scalars:,}"
    assert (rows["unsteered"]["KL"], rows["unsteered"]["effect, %"][:3]) == ("-", "0 [")
    assert "10 source prompts" in table.notes[0]
    assert "10 control prompts" in table.notes[0]


def test_a_gate_has_a_table_against_nothing_and_its_controls(bench: MethodBench) -> None:
    bare, dsas = bench.line("generic"), bench.line(GATE)
    constant = replace(dsas, line=replace(dsas.line, gate="constant"))
    (table,) = replace(bench, reported=(bare, dsas, constant)).gate_tables()
    assert table.title == f"{GATE}, at equal effect"
    found = bench.matched(GATE, "generic")
    assert [row[:4] for row in table.rows[:3]] == [
        ("generic", level, f"{100 * at.a:.0f}", f"{100 * at.b:.0f}")
        for level, at in zip(("25", "50", "75"), found, strict=True)
    ]
    told = [row[4].split(" ")[0] for row in table.rows]
    assert told[:3] == [f"{100 * at.diff:+.0f}" for at in found]
    # beside itself under the name of its control
    assert [row[0] for row in table.rows[3:]] == ["generic + constant gate"] * 3
    assert told[3:] == ["+0"] * 3


def test_an_effect_that_is_not_reached_is_said_so(bench: MethodBench) -> None:
    weak = bench.line("unsteered")
    gated = bench.line(GATE)
    named = replace(weak, line=replace(weak.line, method="generic"))
    (table,) = replace(bench, reported=(named, gated)).gate_tables()
    assert [row[3:] for row in table.rows] == [("-", "not reached")] * 3


def test_progress_is_told_method_by_method(
    bench: MethodBench, calls: list[tuple[str, int, int]]
) -> None:
    assert calls == [("methods", 0, 2), ("methods", 1, 2), ("methods", 2, 2)]


def test_texts_and_names_that_do_not_fit_are_refused_first(atlas: HookedModel) -> None:
    with pytest.raises(ConfigError, match="method must be one of prompting, fusion"):
        compare_methods(atlas, EXAMPLES, methods=("magic",))
    with pytest.raises(ConfigError, match="gate must be one of dsas, permuted, constant"):
        compare_methods(atlas, EXAMPLES, methods=METHODS, gates=("open",))
    with pytest.raises(ContrastError, match=r"'fit' must have at least 10 of 'source', but has 9"):
        compare_methods(atlas, EXAMPLES[1:], methods=METHODS)
    for units in ((0,), (1, 1153)):
        with pytest.raises(ConfigError, match="1 <= units <= 1152 must hold, but got"):
            compare_methods(atlas, EXAMPLES, methods=("generic",), units=units)
    alone = [
        replace(each, prompt=f"{each.prompt} ") if each.kind == "target" else each
        for each in EXAMPLES
    ]
    with pytest.raises(ContrastError, match=r"iti must have at least 10 targets.*but got 0; add"):
        compare_methods(atlas, alone, methods=("generic", "iti"))
    few = [replace(each, subject=f"{each.part}{len(each.prompt) % 4}") for each in EXAMPLES]
    with pytest.raises(ContrastError, match=r"on sources about at least 5 subjects, but got \d"):
        compare_methods(atlas, few, methods=("generic",))
    shared = [replace(each, subject="r1") if each is EXAMPLES[0] else each for each in EXAMPLES]
    with pytest.raises(ContrastError, match="no two parts may share a subject, but 'r1'"):
        compare_methods(atlas, shared, methods=METHODS)
