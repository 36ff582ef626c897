"""What a file, a folder or a server of somebody else must not be able to do."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import fails, says, serving
from test_layers import SOURCES

from fusion_lens import cli, llm_judge
from fusion_lens.crosscoder_files import load_crosscoder
from fusion_lens.errors import FusionLensError, ModelError
from fusion_lens.models import load_model
from fusion_lens.perplexity import PerplexityModel
from fusion_lens.plan_files import load_plan
from fusion_lens.sae_files import load_sae_folder
from fusion_lens.saes import load_sae
from fusion_lens.vector_files import load_vectors

# what makes code of data, by the name it is called or imported by
LOADERS = {
    *("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml"),
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "np.load", "numpy.load", "pandas.read_pickle", "pd.read_pickle"),
    *("os.system", "os.popen", "subprocess", "runpy", "code"),
}
KEY = "sk-canary-0123456789abcdef"


def loaders(source: str) -> set[str]:
    """Which of `LOADERS` a source imports or calls."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.split(".")[0]}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            # `re.compile` and `model.eval()` are methods; what is meant are the builtins
            found.add(ast.unparse(node.func))
    return found & LOADERS


def test_what_makes_code_of_data_is_found_wherever_it_stands() -> None:
    source = """
import pickle as p
from marshal import loads
def late():
    torch.load(path); np.load(path); eval(text)
    re.compile(text); model.eval(); json.load(file)
"""
    assert loaders(source) == {"pickle", "marshal", "torch.load", "np.load", "eval"}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_no_module_makes_code_of_data(name: str) -> None:
    assert loaders(SOURCES[name]) == set()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_no_module_trusts_code_of_a_checkpoint_or_a_pickled_array(name: str) -> None:
    """Each way to open a checkpoint of the user's says so; left out, transformers may ask."""
    for node in ast.walk(ast.parse(SOURCES[name])):
        if not isinstance(node, ast.Call):
            continue
        given = {each.arg: ast.unparse(each.value) for each in node.keywords}
        assert given.get("allow_pickle", "False") == "False"
        assert given.get("weights_only", "True") == "True"
        assert given.get("trust_remote_code", "False") == "False"
        called = ast.unparse(node.func)
        if name == "models" and called.endswith((".from_pretrained", ".boot_transformers")):
            assert "trust_remote_code" in given, called


class Malice:
    """Unpickled, it makes a file."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._place,)


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Path]:
    """The file that must not come to be."""
    place = tmp_path / "made by a pickle"
    yield place
    assert not place.exists()


def test_the_malicious_pickle_would_have_made_its_file(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malice(tmp_path / "made")))
    torch.save({"w": Malice(tmp_path / "too")}, tmp_path / "w.pt")
    torch.load(tmp_path / "w.pt", weights_only=False)
    assert (tmp_path / "made").exists()
    assert (tmp_path / "too").exists()


def pickled(path: Path, made: Path, kind: str) -> Path:
    """A malicious file: a bare pickle, or torch's, which is a zip."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "torch":
        torch.save({"W_enc": torch.zeros(2), "W_dec": Malice(made)}, path)
        assert zipfile.is_zipfile(path)
    else:
        path.write_bytes(pickle.dumps({"W_enc": Malice(made)}))
    return path


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "plan": ("plan.safetensors", load_plan),
    "plan under its own name": ("plan.pt", load_plan),
    "vectors": ("vectors.safetensors", load_vectors),
    "crosscoder": ("model.safetensors", load_crosscoder),
    "crosscoder under its own name": ("pytorch_model.bin", load_crosscoder),
    "SAE": ("sae/sae_weights.safetensors", lambda path: load_sae_folder(path.parent)),
    "SAE of sae-lens": (
        "sae/sae_weights.safetensors",
        lambda path: load_sae(path.parent, reader="sae-lens"),
    ),
    "SAE of a pickle alone": ("sae/pytorch_model.bin", lambda path: load_sae(path.parent)),
    "SAE of torch's alone": ("sae/ae.pt", lambda path: load_sae(path.parent)),
}


@pytest.mark.parametrize("kind", ["bare", "torch"])
@pytest.mark.parametrize("reader", READERS)
def test_a_pickle_in_place_of_weights_is_refused_unread(
    reader: str, kind: str, tmp_path: Path, made: Path
) -> None:
    name, read = READERS[reader]
    path = pickled(tmp_path / name, made, kind)
    if path.parent.name == "sae":
        config = {"architecture": "standard", "d_in": 2, "d_sae": 2}
        config["metadata"] = {"sae_lens_version": "6.0", "hook_name": "blocks.0.hook_resid_post"}
        (path.parent / "cfg.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(FusionLensError, match=r"safetensors|plan file"):
        read(path)


OPENERS = {"steered": load_model, "of perplexity": PerplexityModel}


@pytest.mark.parametrize("opener", OPENERS)
def test_a_checkpoint_of_pickles_is_loaded_as_weights_only(
    opener: str, tiny_folder: Path, tmp_path: Path, made: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Malice(made)}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"must be a usable checkpoint folder .* Weights only"):
        OPENERS[opener](folder)


CODE = """
from pathlib import Path
Path({place!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokens(PreTrainedTokenizerFast): ...
"""
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": (
        "config.json",
        {
            "model_type": "own",
            "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
        },
    ),
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "Tokens", "auto_map": {"AutoTokenizer": [None, "own.Tokens"]}},
    ),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("opener", OPENERS)
def test_code_beside_a_checkpoint_is_not_run_and_nobody_is_asked(
    opener: str,
    part: str,
    tiny_folder: Path,
    tmp_path: Path,
    made: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(prompt: str = "") -> str:
        raise AssertionError(f"asked at the terminal: {prompt}")

    monkeypatch.setattr("builtins.input", asked)
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    name, changes = PARTS[part]
    config = json.loads((folder / name).read_text("utf-8"))
    (folder / name).write_text(json.dumps(config | changes), "utf-8")
    (folder / "own.py").write_text(CODE.format(place=str(made)), "utf-8")
    with pytest.raises(ModelError, match="contains custom code which must be executed"):
        OPENERS[opener](folder)
    assert "own" not in sys.modules


def test_a_key_is_in_nothing_that_a_run_writes_or_prints(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also where the judge's server repeats it in an error."""
    monkeypatch.setattr(llm_judge, "_FIRST_WAIT", 0.01)
    for name in ("JUDGE_API_KEY", "OPENAI_API_KEY", "NEURONPEDIA_API_KEY"):
        monkeypatch.setenv(name, KEY)
    questions = tmp_path / "questions.jsonl"
    lines = [
        {"id": n, "question": f"Who wrote the {n} book?", "answer": "Ada", "explanation": "Fact."}
        for n in ("red", "green")
    ]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    script = {"green book": [fails(401)], "red book": [says("INCORRECT")]}
    with serving(script) as server, caplog.at_level("DEBUG"):
        monkeypatch.setenv("JUDGE_BASE_URL", server.base_url)
        arguments = (
            *("run", "--model", tiny_folder, "--questions", questions, "--out", tmp_path / "run"),
            *("--judge", "openai-api/judge/model", "--judge-cache", tmp_path / "cache.jsonl"),
            *("--arms", "baseline,full", "--trials", 10, "--max-new-tokens", 4),
        )
        monkeypatch.setattr(sys, "argv", ["fusion-lens", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code in (0, None)
    assert server.keys == {KEY}
    assert {server.asked(f"{name} book") > 0 for name in ("red", "green")} == {True}
    printed = capfd.readouterr()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"report.html", "results.jsonl", "summary.json", "run.json"} <= {p.name for p in files}
    assert "unscored" in printed.out
    assert KEY not in printed.out + printed.err + caplog.text
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path.name
