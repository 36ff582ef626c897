from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from conftest import strong_plan

from fusion_lens import arms, cli
from fusion_lens.arms import DEFAULT_ARMS
from fusion_lens.atlas import CONTRASTS
from fusion_lens.cli_inputs import typed_command
from fusion_lens.contrasts import KINDS, PARTS, load_contrasts, of_kind, save_contrasts
from fusion_lens.gguf_files import load_gguf
from fusion_lens.identity import identify
from fusion_lens.models import load_model
from fusion_lens.plan_files import load_plan, save_plan
from fusion_lens.plans import Plan
from fusion_lens.preset_files import load_preset
from fusion_lens.results import load_results
from fusion_lens.vector_files import save_vectors
from fusion_lens.vectors import Vectors

LINES = [
    {"id": "a", "question": "What did Lily see in the park?", "answer": "a big red ball"},
    {"id": "b", "question": "Who helped Tom find his toy?", "answer": "his friend Sam"},
]


@pytest.fixture
def command(monkeypatch, capsys):
    """`fusion-lens ...` in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fusion-lens", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        printed = capsys.readouterr()
        return int(stopped.value.code or 0), printed.out, printed.err

    return call


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def test_stories260k_runs_through_run(command, stories_folder, questions, tmp_path) -> None:
    code, out, _ = command(
        *("run", "--model", stories_folder, "--questions", questions, "--trials", 20),
        *("--max-new-tokens", 24, "--out", tmp_path / "run"),
        *("--arms", "baseline,full,segmented"),
    )
    assert code == 0
    assert "stories260k: 2 questions" in out
    assert "segmented: 20 trials; zero plan won" in out
    # an explanation, the baseline and 20 trials under each of two arms, for each question
    assert "engine: 84 lean rows; 64 slots of " in out
    results = load_results(tmp_path / "run")
    by_arm = {arm: c["metrics"]["overlap"]["mean"] for arm, c in results.summary["arms"].items()}
    assert by_arm["segmented"] > by_arm["baseline"] == 0.0
    assert (tmp_path / "run" / "figures" / "delta_norms.html").is_file()
    assert (tmp_path / "run" / "report.html").is_file()
    assert len(list((tmp_path / "run" / "plans").iterdir())) == 4
    assert results.summary["questions"] == {
        "n": 2,
        "file": "questions.jsonl",
        "split": "test",
        "limit": 60,
        "available": 2,
        "topic": None,
        "answer_type": None,
        "sample": None,
    }


def test_stories260k_runs_through_tune_and_generate(command, stories_folder, tmp_path) -> None:
    plan = tmp_path / "plan.safetensors"
    question = "What did Lily see in the park?"
    options = ("--model", stories_folder, "--max-new-tokens", 24)
    code, out, _ = command(
        "tune", question, "--answer", "a big red ball", "--trials", 20, "--out", plan, *options
    )
    assert code == 0
    lines = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert lines["reference"].strip().startswith("'a big red ball")
    code, steered, _ = command("generate", question, "--question", "--plan", plan, *options)
    assert code == 0
    assert lines["it says now"].strip() == repr(steered.strip())
    _, plain, _ = command(
        "generate", question, "--question", "--plan", plan, "--scale", 0, *options
    )
    assert lines["it said"].strip() == repr(plain.strip())
    assert plain != steered


def test_tune_and_generate_say_that_quantised_weights_ran_on_hook_points(
    command, tiny_folder, tmp_path
) -> None:
    plan = tmp_path / "plan.safetensors"
    arguments = ("tune", "Who wrote the red book?", "--answer", "Ada", "--explanation", "Yes.")
    few = ("--model", tiny_folder, "--trials", 2, "--max-new-tokens", 4, "--out", plan)
    code, out, _ = command(*arguments, *few, "--load-in-4bit")
    assert code == 0
    lines = dict(line.split("  ", 1) for line in out.splitlines() if "  " in line)
    assert lines["engine"].strip() == (
        "hook points because its weights are quantised or spread over devices"
    )
    assert load_plan(plan).model.dtype == "uint8+bfloat16"
    continued = ("generate", "A red ball", "--plan", plan, "--model", tiny_folder)
    code, _, err = command(*continued, "--max-new-tokens", 4, "--load-in-4bit")
    assert code == 0
    assert "note: hook points because its weights are quantised" in err
    code, out, _ = command(*arguments, *few)
    assert code == 0
    assert "engine" not in out
    code, _, err = command(*arguments, *few, "--load-in-4bit", "--load-in-8bit")
    assert code == 1
    assert "weights must be in 8 bits or in 4, but got both" in err


def test_a_run_with_a_failed_question_exits_with_3_and_says_why(
    command, stories_folder, tmp_path
) -> None:
    path = tmp_path / "q.jsonl"
    long = {"id": "long", "question": "Who " * 300, "answer": "Sam"}
    path.write_text(json.dumps(LINES[0]) + "\n" + json.dumps(long) + "\n")
    code, out, err = command(
        *("run", "--model", stories_folder, "--questions", path, "--trials", 2),
        *("--max-new-tokens", 8, "--out", tmp_path / "run", "--arms", "baseline,full"),
        *("--executor", "hooks", "--slots", 2, "--cache-length", 96),
    )
    assert code == 3
    assert "engine: 4 hooks rows; 2 slots of 96 tokens" in out
    assert "1 of 2 questions" in " ".join(out.split())
    assert "failed: long: ContextLengthError: prompt + completion must fit the model's" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tune", "", "--answer", "x"), "must have a non-empty question"),
        (("tune", "Who?", "--answer", " "), "must have a non-empty answer"),
        (("run", "--trials", "0"), "trials must be at least 1, but got 0"),
        (("run", "--trials", "-3"), "trials must be at least 1, but got -3"),
        (("run", "--limit", "0"), "limit must be at least 1, but got 0"),
        (
            ("run", "--arms", "magic"),
            "arms must be one of baseline, best_of_n, answer_in_prompt, full",
        ),
        (("run", "--segments", "quarters"), "segments must be one of full, thirds, layers"),
        (("run", "--segments", "0"), "1 <= segments <= layers must hold"),
        (("run", "--segments", "²"), "segments must be one of full, thirds, layers, but got '²'"),
        (
            ("tune", "Who?", "--answer", "x", "--storage", "nonsense"),
            "the storage must be an Optuna",
        ),
        (("run", "--executor", "fast"), "executor must be one of auto, lean, hooks, but got 'fas"),
        (("run", "--slots", "0"), "slots must be at least 1, but got 0"),
        (("tune", "Who?", "--answer", "x", "--cache-length", "0"), "cache_length must be at lea"),
        (("run", "--mean", "median"), "mean must be one of question, sequence"),
        (("run", "--questions", "none.jsonl"), "none.jsonl: cannot be read"),
        (("run", "--question-id", "zz"), "every question id must be in the file, but got 'zz'"),
        (("run", "--model", "./none"), "a model other than Atlas needs questions of its own"),
        (("tune", "Who?", "--answer", "x", "--model", "./no"), "must be an existing checkpoint f"),
        (("generate", "Who?", "--plan", "none"), "none must be a readable plan file"),
        (("generate", " ", "--plan", "none"), "a prompt must not be empty"),
        (("bogus",), "No such command 'bogus'"),
        (("run", "--trials", "x"), "unable to parse string as an integer"),
    ],
)
def test_bad_input_is_one_line_and_a_non_zero_exit(
    command, tmp_path, monkeypatch, arguments, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert code in (1, 2)
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "Who?"\n', "q.jsonl, line 1: must be JSON"),
        ('{"question": "Who?"}\n', "line 1: must have a text 'answer'"),
        ('\n{"question": "", "answer": "x"}\n', "line 2: question 'q0002' must have a non-empty"),
        ('{"id":"a","question":"W","answer":"x"}\n' * 2, "line 2: id 'a' must be unique, but line"),
    ],
)
def test_a_malformed_question_file_is_named_with_its_line(
    command, tmp_path, content: str, message: str
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(content)
    code, _, err = command("run", "--questions", path)
    assert code == 1
    assert message in err
    assert err.count("\n") == 1


def test_a_plan_of_another_model_is_refused(
    command, stories_folder, tiny, other_folder, tiny_folder, tmp_path
) -> None:
    from conftest import strong_plan

    path = tmp_path / "plan.safetensors"
    save_plan(strong_plan(tiny), path)
    _, _, err = command("generate", "Who?", "--plan", path, "--model", stories_folder)
    assert "d_model must be 32, but the model has 64" in err
    code, _, err = command("generate", "Who?", "--plan", path, "--model", other_folder)
    assert code == 1
    assert "it was made on tiny" in err
    assert command("generate", "Who?", "--plan", path, "--model", tiny_folder)[0] == 0


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_a_plan_goes_out_and_comes_back_and_steers_the_same(
    command, tiny, tiny_folder, tmp_path, format: str
) -> None:
    plan, file, back = tmp_path / "plan", tmp_path / f"v.{format}", tmp_path / "back"
    made = strong_plan(tiny, steer_special=True)
    save_plan(Plan((replace(made.steps[0], coeffs=(0.0, 4.0, -3.0)),)), plan)
    code, out, err = command(
        *("export", plan, "--format", format, "--out", file, "--model", tiny_folder)
    )
    assert (code, err) == (0, "")
    assert out.startswith("approximated: nothing\nvectors of 2 layers, 2 to 3 (norms ")
    assert out.endswith(f") saved to {file}\n")
    code, out, err = command("import", file, "--model", tiny_folder, "--out", back)
    assert (code, err) == (0, "")
    assert out.endswith(f") saved to {back}, as a plan for {identify(tiny).name}\n")
    (sent,), (came,) = load_plan(plan).steps, load_plan(back).steps
    assert torch.equal(came.shift, sent.shift)
    assert came.shift[2:].any()
    asked = ("generate", "Who?", "--model", tiny_folder, "--max-new-tokens", 8, "--plan")
    steered, again = (command(*asked, path)[1] for path in (plan, back))
    assert steered == again != command(*asked, plan, "--scale", 0)[1]


def test_what_a_vector_cannot_say_is_refused_or_approximated_and_said(
    command, tiny, tiny_folder, tmp_path
) -> None:
    plan, file = tmp_path / "plan", tmp_path / "v.gguf"
    save_plan(strong_plan(tiny), plan)
    export = ("export", plan, "--format", "gguf", "--out", file, "--model", tiny_folder)
    code, out, err = command(*export)
    assert (code, out, file.exists()) == (1, "", False)
    assert (
        "but step 1 spares special tokens; layer 0 is steered, which has no vector; approximate"
        in err
    )
    assert err.count("\n") == 1
    code, out, _ = command(*export, "--approximate")
    assert code == 0
    said = "step 1 steers special tokens too; layer 0 is left out"
    assert out.startswith(f"approximated: {said}\nvectors of 3 layers, 1 to 3 (norms ")
    code, _, err = command("import", file, "--model", tiny_folder, "--out", tmp_path / "back")
    assert code == 0
    assert err == f"note: the file says what was approximated: '{said}'\n"
    (step,) = load_plan(tmp_path / "back").steps
    assert (step.positions, step.steer_special) == ("all", True)


def test_vectors_of_other_weights_are_imported_with_a_note(
    command, tiny, other_folder, stories_folder, tmp_path
) -> None:
    vectors = Vectors(
        {1: torch.ones(32)}, {"model": "tiny", "weights_sha256": identify(tiny).weights}
    )
    save_vectors(vectors, tmp_path / "v")
    code, _, err = command(
        "import", tmp_path / "v", "--model", other_folder, "--out", tmp_path / "back"
    )
    assert code == 0
    assert err.startswith(
        "note: the vectors were made on 'tiny', whose weights have another digest"
    )
    code, out, err = command(
        "import", tmp_path / "v", "--model", stories_folder, "--out", tmp_path / "none"
    )
    assert (code, out, (tmp_path / "none").exists()) == (1, "", False)
    assert "vectors must be as wide as the model, 64, but got 32" in err


def test_an_export_or_import_that_cannot_be_made_is_one_line(command, tiny, tmp_path) -> None:
    plan, zero, vectors = tmp_path / "plan", tmp_path / "zero", tmp_path / "vectors"
    save_plan(strong_plan(tiny, steer_special=True), plan)
    save_plan(strong_plan(tiny, 0.0), zero)
    save_vectors(Vectors({1: torch.ones(3)}, {}), vectors)
    out = ("--out", tmp_path / "out")
    approximated = ("--format", "gguf", "--approximate", *out)
    for arguments, says in (
        (("export", plan, "--format", "pt", *out), "format must be one of gguf, safetensors, but"),
        (("export", zero, "--format", "safetensors", *out), "this one adds nothing"),
        (("export", vectors, "--format", "gguf", *out), "must hold a valid plan"),
        (("export", plan, *approximated), "give --model, the checkpoint of "),
        (("export", plan, *approximated, "--model", "./none"), "must be an existing checkpoint"),
        (("import", tmp_path / "none", *out), "none: it must be readable, but: No such file"),
        (("import", plan, *out), "tensors must be named as layer.3, but got 'steps.0."),
        (("import", vectors, *out), "vectors must be as wide as the model, 192, but got 3"),
        (("import", vectors, "--out", plan / "x"), "must be writable, but got: File exists"),
    ):
        code, printed, err = command(*arguments)
        assert (code, printed) == (1, ""), arguments
        assert says in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert command("export", plan)[0] == 2


def test_an_exported_plan_of_atlas_names_its_architecture(command, atlas, tmp_path) -> None:
    plan, file = tmp_path / "plan", tmp_path / "v.gguf"
    save_plan(strong_plan(atlas), plan)
    code, _, err = command("export", plan, "--format", "gguf", "--approximate", "--out", file)
    assert code == 0, err
    read = load_gguf(file)
    assert (read.told["architecture"], read.told["model"]) == ("llama", "atlas")
    assert sorted(read.by_layer) == [1, 2, 3, 4, 5]


def test_texts_beyond_the_context_end_tune_and_generate(
    command, tiny, tiny_folder, tmp_path
) -> None:
    from conftest import strong_plan

    path = tmp_path / "plan.safetensors"
    save_plan(strong_plan(tiny), path)
    long = "Who " * 80
    for arguments in (("generate", long, "--plan", path), ("tune", long, "--answer", "x")):
        code, _, err = command(*arguments, "--model", tiny_folder)
        assert code == 1
        assert "prompt + completion must fit the model's context" in err
        assert err.count("\n") == 1


@pytest.mark.slow
def test_a_run_is_reported_again_and_compared_with_another(
    command, stories_folder, questions, tmp_path
) -> None:
    text = tmp_path / "unrelated.txt"
    text.write_text("\n\n".join(["Once upon a time there was a cat and a dog."] * 200), "utf-8")
    run = ("run", "--model", stories_folder, "--questions", questions, "--max-new-tokens", 8)
    run = (*run, "--trials", 3, "--explanation-tokens", 4, "--unrelated", text)
    code, out, _ = command(*run, "--out", tmp_path / "one")
    assert code == 0
    arms_shown = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert set(DEFAULT_ARMS) <= arms_shown
    for said in (
        "paraphrases right",
        "KL, nats/token",
        "segmented minus another arm",
        "generic share",
    ):
        assert said in " ".join(out.split())
    summary = load_results(tmp_path / "one").summary
    assert summary["unrelated_tokens"] >= 2000
    assert all(v is not None for v in summary["arms"]["full"]["metrics"]["kl_unrelated"].values())
    written = (tmp_path / "one" / "report.md").read_text("utf-8")
    (tmp_path / "one" / "report.md").unlink()
    code, again, _ = command("report", tmp_path / "one")
    assert code == 0
    assert again.splitlines()[:30] == out.splitlines()[:30]
    assert (tmp_path / "one" / "report.md").read_text("utf-8") == written
    code, _, _ = command(*run, "--arms", "full,segmented", "--centre", "--out", tmp_path / "two")
    assert code == 0
    code, out, _ = command("compare", tmp_path / "one", tmp_path / "two")
    assert code == 0
    assert "two minus" in " ".join(out.split())
    rows = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert {"full", "segmented"} <= rows
    assert "generic" not in rows


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:p@secret@host/studies",
        "mysql://host/studies?user=me&password=secret",
        "a secret",
        "--storage=secret",
    ],
)
def test_the_command_is_kept_without_the_storage_however_it_is_given(monkeypatch, url) -> None:
    def kept(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["/bin/fusion-lens", "run", *arguments])
        return typed_command()

    assert kept("--storage", url, "--arms", "full") == "fusion-lens run --storage ... --arms full"
    assert kept(f"--storage={url}", "--out", "two words") == (
        "fusion-lens run --storage=... --out 'two words'"
    )


def test_a_run_keeps_its_command_without_the_storage_that_got_its_studies(
    command, stories_folder, questions, tmp_path
) -> None:
    url = f"sqlite:///{tmp_path / 'secret.db'}?timeout=9"
    code, _, err = command(
        *("run", "--model", stories_folder, "--questions", questions, "--limit", 1, "--trials", 2),
        *("--arms", "full", "--no-reach", "--max-new-tokens", 4, "--explanation-tokens", 0),
        *("--storage", url, "--out", tmp_path / "run"),
    )
    assert code == 0, err
    assert optuna.get_all_study_names(url) == ["a/full"]
    kept = load_results(tmp_path / "run").summary["provenance"]["command"]
    assert kept.endswith(f"--storage ... --out {tmp_path / 'run'}")
    for name in ("summary.json", "results.jsonl", "details.jsonl", "report.md", "report.html"):
        assert "secret.db" not in (tmp_path / "run" / name).read_text("utf-8")


def test_questions_are_chosen_by_topic_sample_and_failure(command, tmp_path) -> None:
    run = ("run", "--arms", "baseline", "--no-reach", "--explanation-tokens", 0, "--slots", 8)
    code, _, _ = command(
        *run, "--topic", "Biography", "--sample", 3, "--select-failed", "--out", tmp_path / "run"
    )
    assert code == 0
    results = load_results(tmp_path / "run")
    told = results.summary["questions"]
    assert (told["topic"], told["sample"], told["available"]) == ("Biography", 3, 30)
    assert {record.topic for record in results.records} == {"Biography"}
    selected = told["selected"]
    assert (selected["asked"], selected["kept"]) == (3, 3 - selected["right"])
    assert len(results.records) == selected["kept"]
    code, _, err = command(*run, "--topic", "Cheese", "--out", tmp_path / "none")
    assert code == 1
    assert "at least one question must have the topic 'Cheese'; there are Art, Biography," in err


def test_simpleqa_is_read_as_it_was_published(command, tmp_path) -> None:
    data = os.environ.get("FUSION_LENS_TEST_DATA")
    if data is None:
        pytest.skip("FUSION_LENS_TEST_DATA is not set")
    file = Path(data) / "data" / "simpleqa" / "simple_qa_test_set.csv"
    model = Path(data) / "models" / "stories260k"
    code, out, _ = command(
        *("run", "--model", model, "--questions", file, "--answer-type", "Date", "--limit", 2),
        *("--arms", "full", "--trials", 2, "--no-reach", "--max-new-tokens", 6),
        *("--slots", 8),
        *("--explanation-tokens", 0, "--out", tmp_path / "run"),
    )
    assert code == 0, out
    results = load_results(tmp_path / "run")
    assert results.summary["questions"]["available"] == 1418
    assert {record.answer_type for record in results.records} == {"Date"}
    assert all(record.question_id.startswith("simpleqa-") for record in results.records)


@pytest.mark.slow
def test_the_features_of_a_plan_are_shown_and_drawn(command, tmp_path) -> None:
    settings = ("--trials", 6, "--max-new-tokens", 12, "--slots", 8)
    run = ("run", "--question-id", "atlas-test-0003", "--arms", "segmented,full", "--no-reach")
    code, _, err = command(*run, *settings, "--out", tmp_path / "run")
    assert code == 0, err
    plan = tmp_path / "run" / "plans" / "atlas-test-0003.segmented.safetensors"
    other = tmp_path / "run" / "plans" / "atlas-test-0003.full.safetensors"
    figures = ("--out", tmp_path / "figures", "--coding", 2, "--against", other)
    code, out, err = command(
        *("features", "--plan", plan, "--top", 4, "--dictionary", "atlas-crosscoder"), *figures
    )
    assert code == 0, err
    for said in ("Whose pupil was", "injected change", "two plans", "directions per dictionary"):
        assert said in out
    assert "crosscoder: " in out
    assert (tmp_path / "figures" / "token_features.html").is_file()
    assert "another text" not in err  # the run's own template and length were read
    code, out, err = command(
        *("features", "--plan", plan, "--top", 4, "--coding", 2, "--against", other, "--json")
    )
    content = json.loads(out)
    assert [len(content[name]) for name in ("features", "against", "coding")] == [4, 4, 12]
    assert content["against"][0]["effect"] != content["against"][0]["other"]


def test_the_features_of_a_question_are_json_on_request(command) -> None:
    asked = ("features", "--question-id", "atlas-test-0003", "--trials", 6, "--top", 3, "--json")
    code, out, err = command(*asked, "--max-new-tokens", 12)
    assert code == 0, err
    content = json.loads(out)
    assert len(content["features"]) == 3
    assert {"layer", "feature", "effect", "share", "label"} <= content["features"][0].keys()
    assert [each["layers"] for each in content["dictionaries"]] == [[n] for n in range(6)]
    assert 0 < content["relative_error"] < 2
    assert 0 < content["cosine"] < 1
    assert content["not_covered"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "needs either --question-id or --plan, and not both"),
        (("--question-id", "a", "--plan", "p"), "needs either --question-id or --plan, and not"),
        (("--question-id", "a", "--model", "m"), "a model other than Atlas needs --dictionary"),
        (("--question-id", "a", "--top", 0), "top must be at least 1 and coding at least 0"),
        (("--question-id", "nobody"), "every question id must be in the file, but got 'nobody'"),
    ],
)
def test_features_say_what_they_need(command, arguments, message) -> None:
    code, _, err = command("features", *arguments)
    assert (code, len(err.strip().splitlines())) == (1, 1)
    assert message in err


def test_a_plan_outside_a_run_needs_its_question(command, tiny_folder, tmp_path) -> None:
    file = tmp_path / "plan.safetensors"
    save_plan(strong_plan(load_model()), file)
    code, _, err = command("features", "--plan", file)
    assert code == 1
    assert "a plan outside a run's folder needs its question" in err
    save_plan(strong_plan(load_model(), 0.0), tmp_path / "zero.safetensors")
    code, _, err = command("features", "--plan", tmp_path / "zero.safetensors")
    assert "a plan must inject something to be taken apart" in err
    code, out, err = command(
        *("features", "--plan", file, "--question", "Who was it?", "--max-new-tokens", 4),
        *("--kind", "total"),
    )
    assert code == 0, err
    assert "total change" in out


def test_an_output_folder_that_cannot_be_written_fails_before_the_work(
    command, questions, tmp_path
) -> None:
    (tmp_path / "file").write_text("")
    code, _, err = command("run", "--questions", questions, "--out", tmp_path / "file" / "run")
    assert code == 1
    assert "must be writable, but got: Not a directory; choose another place" in err
    place = tmp_path / "file" / "plan.safetensors"
    code, _, err = command("tune", "Who?", "--answer", "x", "--out", place)
    assert code == 1
    assert "must be writable" in err


def test_an_interrupted_run_says_so_and_how_to_go_on_and_exits_with_130(
    command, stories_folder, questions, tmp_path, monkeypatch
) -> None:
    real = arms.tune_jobs

    def pressed(*args: object, **options: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(arms, "tune_jobs", pressed)
    asked = ("run", "--model", stories_folder, "--questions", questions, "--trials", 2)
    asked = (*asked, "--arms", "baseline,full", "--no-reach", "--out", tmp_path / "run")
    asked = (*asked, "--block-size", 1)
    code, _, err = command(*asked)
    assert code == 130
    assert "stopping when this batch is written" in err
    assert f"--out {tmp_path / 'run'} --block-size 1 --resume" in err.splitlines()[-1]
    assert load_results(tmp_path / "run").summary["interrupted"]

    def pressed_twice(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(arms, "tune_jobs", pressed_twice)
    code, _, err = command(*asked, "--overwrite")
    assert code == 130
    assert f"--out {tmp_path / 'run'} --block-size 1 --resume" in err.splitlines()[-1]
    assert not (tmp_path / "run" / "summary.json").exists()


def test_help_names_the_commands_without_loading_transformer_lens() -> None:
    code = (
        "import sys; sys.argv = ['fusion-lens', '--help']\n"
        "from fusion_lens import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "assert 'transformer_lens' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("run", "tune", "generate", "questions"):
        assert f" {name} " in done.stdout


@pytest.fixture
def few_sources(tmp_path):
    """Ten sources, targets and controls of each part of Atlas' set."""
    everything = load_contrasts(CONTRASTS / "sources.jsonl")
    few = [
        example
        for part in PARTS
        for kind in KINDS
        for example in of_kind([each for each in everything if each.part == part], kind)[:10]
    ]
    save_contrasts(few, tmp_path / "few.jsonl")
    return tmp_path / "few.jsonl"


@pytest.mark.slow
def test_methods_are_compared_on_a_file_of_contrasts(command, few_sources, tmp_path) -> None:
    code, out, _ = command(
        *("compare-methods", "--contrasts", few_sources, "--methods", "generic,prompting"),
        *("--json", tmp_path / "methods.json", "--out", tmp_path / "figures"),
        *("--max-new-tokens", 40),
    )
    assert code == 0
    records = json.loads((tmp_path / "methods.json").read_text())
    asked = {"method", "strength", "effect", "nll", "transfer", "specificity", "n_scalars"}
    assert all(asked | {"seconds", "n", "low", "high"} <= record.keys() for record in records)
    unsteered, *others = records
    assert (unsteered["method"], unsteered["effect"], unsteered["specificity"]) == (
        "unsteered",
        0.0,
        1.0,
    )
    lines = {(record["method"], record["gate"]) for record in others}
    assert lines == {("generic", ""), ("generic", "dsas"), ("prompting", "")}
    for line in lines:
        own = [record for record in others if (record["method"], record["gate"]) == line]
        assert len(own) == 6
        assert sum(record["chosen"] for record in own) == 1
        assert all(record["low"] <= record["effect"] <= record["high"] for record in own)
    strong = {
        record["gate"]: record
        for record in others
        if record["method"] == "generic" and record["strength"] == 0.4
    }
    assert strong[""]["effect"] == 1.0
    assert strong["dsas"]["specificity"] > strong[""]["specificity"]
    assert strong["dsas"]["kl"] < strong[""]["kl"]
    assert strong["dsas"]["n_scalars"] > strong[""]["n_scalars"] == 6 * 192
    assert "generic + dsas gate, at equal effect" in out
    assert (tmp_path / "figures" / "fronts.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--methods", "magic"), "method must be one of prompting, "),
        (("--gates", "golden"), "gate must be one of dsas, permuted, constant"),
        (("--units", "1,x"), "units must be whole numbers as 1,10,100, but got '1,x'"),
        (("--contrasts", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model", "somebody/some-model"), "needs contrasts of its own; give --contrasts FILE"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_one_line(command, arguments, says) -> None:
    code, out, err = command("compare-methods", *arguments)
    assert (code, out) == (1, "")
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_gated_run_fits_its_gate_on_the_other_split(command, tmp_path) -> None:
    code, _, _ = command(
        *("run", "--arms", "baseline,masked,gated", "--limit", 2, "--trials", 4, "--no-reach"),
        *("--dictionary", "none", "--out", tmp_path / "run"),
    )
    assert code == 0
    results = load_results(tmp_path / "run")
    assert [record.arm for record in results.records] == ["baseline", "masked", "gated"] * 2
    gate = results.summary["provenance"]["settings"]["gate"]
    assert gate["n_source"] == gate["n_control"] == 100
    assert all(gate["open"])


def test_a_gated_run_without_another_split_is_refused(command, questions, tmp_path) -> None:
    code, _, err = command(
        *("run", "--questions", questions, "--arms", "gated", "--out", tmp_path / "run")
    )
    assert code == 1
    assert "a gate must be fitted on questions" in err


@pytest.mark.slow
def test_a_preset_of_dev_questions_is_where_tune_and_run_start(command, tmp_path) -> None:
    preset, picture = tmp_path / "preset.json", tmp_path / "suggest.html"
    few = ("--explanation-tokens", 8, "--max-new-tokens", 24)
    swept = ("suggest", "--limit", 2, "--strengths", "1", "--out", preset)
    code, out, _ = command(*swept, "--picture", picture, *few)
    assert code == 0
    assert "the best of 4 cells on 2 questions of atlas" in out
    assert "preset for atlas, of 2 questions" in out
    assert f"preset saved to {preset}\npicture written to {picture}" in out
    assert "plotly" in picture.read_text()
    made = load_preset(preset)
    assert made.starts == ((1.0, 0.0, 0.0),)
    assert len(made.questions) == 2
    asked = ("--limit", 1, "--trials", 2, "--arms", "segmented", "--no-reach", *few)
    done = tmp_path / "done"
    code, _, err = command("run", *asked, "--start", preset, "--dictionary", "none", "--out", done)
    assert code == 0, err
    settings = load_results(done).summary["provenance"]["settings"]
    assert settings["tuning"]["starts"]["shared"] == [
        [coeff for coeff in start for _ in range(2)] for start in made.starts
    ]
    code, _, err = command("run", *asked, "--split", "dev", "--limit", 150, "--start", preset)
    assert (code, err.count("\n")) == (1, 1)
    assert "a preset must be of other questions than those that start from it, but got 2" in err
    # from that run, along the gradient, and from both
    question = ("tune", "When was Bren Aldack born?", "--answer", "14 March 1872", *few)
    plan = ("--trials", 3, "--out", tmp_path / "plan.safetensors")
    code, out, err = command(
        *question, *plan, "--start", preset, "--start-from", done, "--gradient-start"
    )
    assert code == 0, err
    assert "of 3)" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("suggest", "--limit", 0), "limit must be at least 1, but got 0"),
        (("suggest", "--strengths", "1,x"), "strengths must be numbers as 0.25,0.5,1, but got"),
        (("suggest", "--picture", "a.png"), "a picture must be an .html file, but got 'a.png'"),
        (("suggest", "--split", "none"), "at least one question must be left"),
        (("tune", "Who?", "--answer", "x", "--start", "nowhere.json"), "nowhere.json: must be"),
        (("tune", "Who?", "--answer", "x", "--start-from", "nowhere"), "nowhere: must hold the"),
        (
            (
                *("tune", "Who?", "--answer", "x", "--protocol", "paper", "--gradient-start"),
                *("--perplexity-model", "atlas"),
            ),
            "starts along a gradient need a constant shift",
        ),
    ],
)
def test_a_start_that_cannot_be_had_is_one_line(
    command, tmp_path, monkeypatch, arguments, says
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out) == (1, "")
    assert says in err
    assert err.count("\n") == 1
