from __future__ import annotations

import io
from dataclasses import asdict, replace

import pytest
from records import arm, interval, make_results, summary
from rich.console import Console

from fusion_lens.report import (
    caption,
    engine_line,
    failure_lines,
    lender_lines,
    markdown_report,
    run_differences,
    sections,
    tuned_lines,
)
from fusion_lens.statistics import Comparison
from fusion_lens.tables import Section


def printed(content: dict) -> list[str]:
    """The table as a terminal of 80 columns shows it."""
    console = Console(width=80, file=io.StringIO())
    for section in sections(content, between="\n"):
        console.print(section.to_rich())
    return console.file.getvalue().splitlines()


def test_a_row_holds_each_metrics_mean_and_interval() -> None:
    scores, reach, labels = sections(make_results().summary)
    baseline, segmented = scores.rows
    assert scores.header == ("arm", "n", "right", "overlap", "objective", "perplexity")
    assert baseline[:3] == ("baseline", "12", "0.0% [0.0%, 0.0%]")
    assert segmented == (
        "segmented",
        "12",
        "25.0% [0.0%, 50.0%]",
        "0.50 [0.25, 0.75]",
        "+0.31 [-0.06, +0.50]",
        "12.3 [4.5, 67.8]",
    )
    assert reach.header[2:] == ("paraphrases right", "neighbours kept", "KL, nats/token")
    assert reach.rows[1][2:] == (
        "12.5% [0.0%, 25.0%]",
        "75.0% [50.0%, 100.0%]",
        "0.062 [0.031, 0.125]",
    )
    # 3 correct, 6 incorrect, 1 not attempted, 2 unscored
    assert labels.title == "labelled by the judge lexical"
    assert labels.rows[1][1:] == ("10", "30.0%", "60.0%", "10.0%", "33.3%", "31.6%", "2")


def test_unscored_values_are_counted_and_an_unscored_metric_is_no_number() -> None:
    content = summary(
        full=arm(overlap=interval(0.5, 0.25, 0.75, 3), perplexity=interval(None, None, None, 12))
    )
    assert sections(content)[0].rows[0][3:] == (
        "0.50 [0.25, 0.75] (3 unscored)",
        "+0.31 [-0.06, +0.50]",
        "unscored",
    )


def test_a_mean_without_an_interval_stands_alone() -> None:
    content = summary(full=arm(exact_match=interval(1 / 3, None, None)))
    assert sections(content)[0].rows[0][2] == "33.3%"


def test_the_markdown_table_is_aligned_and_complete() -> None:
    assert sections(summary(full=arm()))[0].to_markdown().splitlines() == [
        "| arm | n | right | overlap | objective | perplexity |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| full | 12 | 25.0% [0.0%, 50.0%] | 0.50 [0.25, 0.75] | +0.31 [-0.06, +0.50] "
        "| 12.3 [4.5, 67.8] |",
    ]


def test_the_terminal_shows_intervals_below_means() -> None:
    assert [line.split() for line in printed(summary(full=arm()))[3:5]] == [
        ["full", "12", "25.0%", "0.50", "+0.31", "12.3"],
        ["[0.0%,", "50.0%]", "[0.25,", "0.75]", "[-0.06,", "+0.50]", "[4.5,", "67.8]"],
    ]


WIDE = interval(12345.6, 4123.5, 671234.5, 12)
CERTAIN = interval(1.0, 1.0, 1.0, 12)


@pytest.mark.parametrize(
    "metrics",
    [
        {},
        {"exact_match": CERTAIN},
        {"exact_match": CERTAIN, "overlap": CERTAIN, "perplexity": WIDE},
    ],
)
@pytest.mark.parametrize("n", [12, 4326])
def test_no_cell_is_cut_in_80_columns(metrics: dict, n: int) -> None:
    content = summary(baseline=arm(**metrics), segmented=arm(**metrics) | {"n": n})
    lines = printed(content)
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    shown = "".join("".join(lines).split())
    for section in sections(content):
        for row in section.rows:
            for cell in row:
                for part in cell.split():
                    assert part in shown


def test_the_caption_names_model_questions_and_clusters() -> None:
    assert caption(summary(full=arm())) == (
        "tiny: 12 questions (6 subjects); mean [95 % cluster bootstrap]"
    )


def test_the_caption_says_where_nothing_clusters_what_failed_and_whether_it_ended() -> None:
    content = summary(full=arm() | {"clusters": 12})
    content |= {"interrupted": True, "failures": [{}, {}]}
    assert caption(content) == (
        "tiny: 12 questions (every question its own cluster), 2 failed, interrupted; "
        "mean [95 % cluster bootstrap]"
    )
    assert caption(content) in " ".join(" ".join(printed(content)).split())


def test_tuned_arms_tell_trials_ties_and_the_medians_of_what_steered() -> None:
    made = make_results().summary
    assert tuned_lines(made) == [
        "segmented: 30 trials; zero plan won 50%, trials tied 0%; "
        "median coefficient of the other 1: early 1.50, late 0.50"
    ]
    made["arms"]["segmented"] |= {"n_trials": [10, 30], "steered": 0, "zero_won": 1.0}
    assert tuned_lines(made) == ["segmented: 10 to 30 trials; zero plan won 100%, trials tied 0%"]


def test_the_caption_says_of_how_many_questions_a_run_took_its_own() -> None:
    made = make_results().summary
    made["questions"]["available"] = 40
    assert caption(made).startswith("tiny: 12 of 40 questions (6 subjects)")


def test_every_failure_has_its_line() -> None:
    content = summary(full=arm())
    span = {"error": "SpanError", "message": "the answer is not in the text."}
    logits = {"error": "ActivationError", "message": "the model's logits must be finite."}
    content["failures"] = [
        {"question_id": "a", "arm": None} | span,
        {"question_id": "b", "arm": "full"} | logits,
    ]
    assert failure_lines(content) == [
        "a: SpanError: the answer is not in the text.",
        "b, full: ActivationError: the model's logits must be finite.",
    ]


def test_the_engine_tells_rows_by_executor_and_their_shape() -> None:
    content = summary(full=arm())
    assert engine_line(content) == "engine: 372 lean rows; 64 slots of 96 tokens"
    content["engine"]["rows"] = {"lean": 0, "hooks": 0}
    assert engine_line(content) == "engine: no rows; 64 slots of 96 tokens"


def test_the_engine_tells_why_hook_points_were_used_and_where_memory_ran_out() -> None:
    content = summary(full=arm())
    content["engine"] = {
        "rows": {"lean": 1200, "hooks": 30},
        "reasons": ["its blocks are not one list of modules"],
        "halvings": 2,
    }
    assert engine_line(content) == (
        "engine: 1,200 lean, 30 hooks rows; 64 slots of 96 tokens, "
        "halved 2 times for lack of memory; "
        "hook points because its blocks are not one list of modules"
    )


def against(other: str, metric: str, **more: object) -> dict:
    made = Comparison("segmented", other, metric, 12, 0, 6, 0.125, -0.25, 0.5, 0.25, 0.5, "McNemar")
    return asdict(replace(made, **more))


def test_segmented_is_set_against_every_other_arm_with_corrected_p() -> None:
    metrics = ("objective", "overlap", "exact_match", "transfer_exact_match")
    further = ("correct", "token_f1", "nll", "neighbours_kept", "kl_unrelated")
    content = summary(segmented=arm(), generic=arm())
    content["comparisons"] = [
        *(against("generic", metric) for metric in (*metrics, *further)),
        *(against("baseline", metric, p=None, p_holm=None) for metric in (*metrics, *further)),
    ]
    content["comparisons"][1] |= {"n": 10, "unscored": 2}
    content["comparisons"][2] |= {"diff": None}
    table = sections(content)[-1]
    assert table.rows == (
        (
            "generic",
            "+0.12 [-0.25, +0.50] p 0.5",
            "+0.12 [-0.25, +0.50] p 0.5 (n 10)",
            "unscored",
            "+12.5% [-25.0%, +50.0%] p 0.5",
        ),
        (
            "baseline",
            "+0.12 [-0.25, +0.50]",
            "+0.12 [-0.25, +0.50]",
            "+12.5% [-25.0%, +50.0%]",
            "+12.5% [-25.0%, +50.0%]",
        ),
    )
    assert max(map(len, printed(content))) <= 80
    assert (
        "| minus | judged correct | token F1 | nats/token | neighbours kept |"
        in markdown_report(content)
    )


def test_the_report_holds_every_table_and_line() -> None:
    content = make_results().summary
    content["groups"] = {"topic": {"Books": {"full": arm()["metrics"]}}}
    content["failures"] = [
        {"question_id": "a", "arm": None, "error": "SpanError", "message": "not in the text."}
    ]
    report = markdown_report(content)
    assert report.count("| --- |") == 4
    assert "**topic: Books**" in report
    assert (
        "| full | 12 | 25.0% [0.0%, 50.0%] | 0.50 [0.25, 0.75] | +0.31 [-0.06, +0.50] |" in report
    )
    for line in (*tuned_lines(content), *lender_lines(content), engine_line(content)):
        assert f"- {line}\n" in report
    assert "- failed: a: SpanError: not in the text.\n" in report


def test_the_generic_share_is_a_median_of_means_over_layers() -> None:
    content = summary(mismatched=arm())
    assert lender_lines(content) == [
        "generic share: 44% of a delta's squared norm (median over 2 questions, mean over layers) "
        "lies along the mean delta of the others, 12 in all",
        "mismatched: 11 questions have a donor, 2 of them one that shares a word with the answer",
    ]
    assert lender_lines(summary(full=arm()) | {"generic_share": {"median": None, "n": 0}}) == []


def test_two_runs_are_told_apart_arm_by_arm() -> None:
    metrics = ("objective", "overlap", "exact_match", "transfer_exact_match")
    made = [
        Comparison("full", "full", m, 3, 0, 3, 0.5, 0.25, 0.75, 0.25, 0.25, "x") for m in metrics
    ]
    table = run_differences(made, ("a", "b"))
    assert table.title == "b minus a, paired by question; p Holm-corrected over the arms"
    assert table.rows[0][:2] == ("full", "+0.50\n[+0.25, +0.75]\np 0.25")


def test_a_cell_that_looks_like_markup_is_printed_as_it_is() -> None:
    console = Console(width=80, file=io.StringIO())
    console.print(Section("t", ("layer", "label"), (("1", "[/b] is [red]"),)).to_rich())
    assert "[/b] is [red]" in console.file.getvalue()
