from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from judge_server import JudgeServer, says, serving

from fusion_lens import cli
from fusion_lens.decoding import Row
from fusion_lens.generation import generate
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel, load_model
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.plan_files import load_plan
from fusion_lens.prompts import question_prompt, tokenize
from fusion_lens.protocols import PAPER
from fusion_lens.published import published_overlap
from fusion_lens.results import Results, load_results, plan_path

SIMPLEQA = """metadata,problem,answer
"{'topic': 'Art', 'answer_type': 'Person', 'urls': []}",Who wrote the red book?,Ada Lovelace
"{'topic': 'Art', 'answer_type': 'Date', 'urls': []}",When was Tom born?,3 May 1901
"{'topic': 'Art', 'answer_type': 'Place', 'urls': []}",Where is it quiet in winter?,The harbour
"""
# the baseline is CORRECT on Tom, and what is steered is CORRECT but graded 2
SCRIPT = {
    "on a scale from 1 to 5": [says("2")],
    "Answer and explanation:": [says("CORRECT")],
    "When was Tom born?": [says("CORRECT")],
    "": [says("INCORRECT")],
}


class Paper:
    """One run of the paper's protocol from the command line: its folder and its judge."""

    def __init__(self, folder: Path, server: JudgeServer) -> None:
        self.folder = folder
        self.server = server
        self.results: Results = load_results(folder)
        self.records = {(r.question_id, r.arm): r for r in self.results.records}


@pytest.fixture(scope="module")
def paper(gemma_folder: Path, gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Paper:
    folder = tmp_path_factory.mktemp("paper")
    (folder / "simpleqa.csv").write_text(SIMPLEQA)
    with serving(SCRIPT) as server, pytest.MonkeyPatch.context() as patched:
        patched.setenv("JUDGE_API_KEY", "sk-none")
        patched.setenv("JUDGE_BASE_URL", server.base_url)
        arguments = (
            *("run", "--protocol", "paper", "--model", gemma_folder, "--load-in-8bit"),
            *("--questions", folder / "simpleqa.csv", "--limit", 500, "--select-failed"),
            *("--judge", "openai-api/judge/model", "--judge-price", "2,10"),
            *("--perplexity-model", gpt2_folder, "--max-new-tokens", 12, "--slots", 8),
            *("--explanation-tokens", 6, "--out", folder / "run"),
        )
        patched.setattr(sys, "argv", ["fusion-lens", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    return Paper(folder / "run", server)


@pytest.fixture(scope="module")
def gemma(gemma_folder: Path) -> HookedModel:
    return load_model(gemma_folder, load_in_8bit=True)


def test_only_questions_whose_baseline_the_judge_calls_incorrect_are_run(paper: Paper) -> None:
    selected = paper.results.summary["questions"]["selected"]
    assert (selected["asked"], selected["kept"]) == (3, 2)
    assert selected["labels"]["incorrect"] == pytest.approx(2 / 3)
    assert list(paper.records) == [
        (name, arm)
        for name in ("simpleqa-0001", "simpleqa-0003")
        for arm in ("baseline", "full", "segmented")
    ]


def test_the_model_is_in_8_bit_and_runs_on_its_hook_points(
    paper: Paper, gemma: HookedModel
) -> None:
    provenance = paper.results.summary["provenance"]
    assert (provenance["dtype"], provenance["weights_sha256"]) == (
        "int8+float16",
        identify(gemma).weights,
    )
    engine = paper.results.summary["engine"]
    # of 2 questions each an explanation, a baseline, and 5 trials in 2 arms
    assert engine["rows"] == {"lean": 0, "hooks": 2 + 2 + 2 * 2 * 5}
    assert engine["reasons"] == ["its weights are quantised or spread over devices"]


def test_the_baseline_is_the_bare_question(paper: Paper, gemma: HookedModel) -> None:
    record = paper.records["simpleqa-0001", "baseline"]
    prompt = tokenize(gemma, "Who wrote the red book?")
    settings = PAPER.experiment.tuning.generation
    config = type(settings)(max_new_tokens=12, slots=8, cache_length=64)
    assert generate(gemma, [Row(prompt)], config)[0].text == record.completion


def test_the_search_is_five_trials_without_the_zero_plan(paper: Paper) -> None:
    for (_, arm), record in paper.records.items():
        if arm == "baseline":
            continue
        assert (record.n_trials, record.zero_won) == (5, None)
        assert len(record.coeffs) == (1 if arm == "full" else 3)
        # the product of two numbers from [0.01, 1]
        assert all(1e-4 <= coeff <= 1.0 for coeff in record.coeffs.values())


def test_a_plan_is_the_authors_hook_and_steers_bos_too(paper: Paper, gemma: HookedModel) -> None:
    record = paper.records["simpleqa-0001", "segmented"]
    plan = load_plan(plan_path(paper.folder, "simpleqa-0001", "segmented"))
    assert [(step.mean, step.steer_special) for step in plan.steps] == [("sequence", True)]
    assert [(s.start, s.stop) for s in plan.steps[0].segments] == [(0, 2), (2, 3), (3, 4)]
    prompt = question_prompt(gemma, "Who wrote the red book?")
    assert plan.needs_sequence
    config = PAPER.experiment.tuning.generation
    again = generate(gemma, [Row(prompt, plan)], type(config)(max_new_tokens=12, slots=8))[0]
    assert again.text == record.completion


def test_metrics_and_judge_see_prompt_and_completion(paper: Paper, gpt2_folder: Path) -> None:
    gpt2 = PerplexityModel(gpt2_folder)
    for (_, arm), record in paper.records.items():
        asked = f"Question: {record.question}\nAnswer and explanation:"
        whole = (record.question if arm == "baseline" else asked) + record.completion
        assert paper.server.asked(f">\n{whole}\n</answer-")
        assert record.overlap == published_overlap(whole, record.answer)
        (nll,) = gpt2.window_nll([whole])
        assert record.nll == pytest.approx(nll, abs=1e-6)
        by_hand = 0.7 * record.overlap - 0.3 * min(math.exp(nll) / 100, 1.0)
        assert record.objective == pytest.approx(by_hand, abs=1e-6)


def test_composite_is_half_overlap_and_half_grade(paper: Paper) -> None:
    for record in paper.records.values():
        assert record.grade == 2.0
        assert record.composite == pytest.approx(0.5 * record.overlap + 0.5 * 2 / 5)
        assert record.accurate == float(record.composite >= 0.6)
        assert record.label == ("INCORRECT" if record.arm == "baseline" else "CORRECT")
        assert record.transfer_n == 0


def test_the_report_says_what_was_measured_and_what_the_judge_cost(paper: Paper) -> None:
    report = (paper.folder / "report.md").read_text("utf-8")
    assert "as published, of prompt + completion" in report
    judge = paper.results.summary["judge"]
    assert judge["grade"]
    assert judge["requests"] == len(paper.server.bodies)
    assert f"judge openai-api/judge/model: {judge['requests']} requests" in report
    assert judge["cost"] == (judge["tokens_in"] * 2 + judge["tokens_out"] * 10) / 1e6
    assert "no zero plan, trials tied" in report
    assert "| arm | n | grade | composite | accurate |" in report


def test_8_bit_stays_close_to_the_full_precision(gemma: HookedModel, gemma_folder: Path) -> None:
    tokens = torch.tensor([tokenize(gemma, "Who wrote the red book?").tokens])
    exact, coarse = (m(tokens).float() for m in (load_model(gemma_folder), gemma))
    drift = (coarse - exact).norm() / exact.norm()
    assert 1e-4 < drift < 0.1
