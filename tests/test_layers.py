from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fusion_lens

ROOT = Path(fusion_lens.__file__).parent

# a module may import the rows above its own, and no module of its own row
LAYERS = (
    {"errors", "operators", "progress", "differences", "stopping"},
    {"durable", "memory", "typed_json"},
    {"json_lines"},
    {
        *{"values", "published", "hub", "judge_cache", "tensor_files"},
        *{"pictures", "tables", "record_files", "segments", "gguf_headers", "quantisation"},
    },
    {"scores", "question_layouts", "starts"},
    {"claims"},
    {"golds"},
    {"questions", "contrasts", "models", "llama", "judges"},
    {"identity"},
    {"messages", "lean", "engine_log", "judge_prompts", "dictionaries", "gatherer", "presets"},
    {"prompts"},
    {
        *{"llm_judge", "sae_configs", "crosscoders", "sparse_coding", "feature_labels"},
        *{"preset_files"},
    },
    {"executors", "sae_files", "crosscoder_files"},
    {"activations", "saes"},
    {"deltas"},
    {"steps", "units"},
    {"plans", "controls", "perplexity"},
    {"moves"},
    {"plan_files", "hooks", "decoding"},
    {"slots", "batches", "search", "divergence", "vectors"},
    {"vector_files"},
    {"gguf_files"},
    {"generation", "graders", "likelihood", "details"},
    {"preparation", "statistics", "replies", "inspect_args"},
    {"report", "fronts", "summary_layout"},
    {"results"},
    {"run_folder", "similar_starts"},
    {"scoring", "teacher_forcing"},
    {"gradient_starts"},
    {"tuning", "start_sources"},
    {
        *{"lenders", "summary", "attribution", "logit_lens", "panel"},
        *{"site_activations", "contrast_texts", "gate_values", "suggestions"},
    },
    {"methods.checks"},
    {
        *{"methods", "methods.dsas", "methods.wasserstein", "methods.austeer", "methods.iti"},
        *{"methods.linear_act", "methods.prompting", "methods.act_add", "methods.caa"},
        *{"methods.control_vectors"},
    },
    {"methods.dsas_end_to_end"},
    {"arms", "interventions", "behaviours", "question_gates"},
    {"experiment_config", "method_suite"},
    {"method_bench"},
    {"transfer", "selection", "faithfulness", "tracing"},
    {"isolation"},
    {"workers"},
    {"judged_results", "run_identity", "run_memory", "ray_jobs"},
    {
        *{"experiment", "delta_plots", "tuning_plots", "token_plots", "feature_plots"},
        *{"report_data", "method_plots", "front_plots", "suggestion_plots"},
    },
    {"run_plots"},
    {"plots"},
    {"protocols", "feature_report", "shelves", "report_page", "ray_engine"},
    {"recipes"},
    {"cli_options", "cli_inputs", "inspect_models"},
    {
        *{"commands", "commands.running", "commands.tuning", "commands.features"},
        *{"commands.questions", "commands.comparing", "commands.exporting"},
        *{"commands.suggesting", "inspect_tasks"},
    },
    {"cli"},
)
LAYER = {name: i for i, row in enumerate(LAYERS) for name in row}

# the package that made the bundled model: who may import what of it, and what it may import
ATLAS_USERS = {
    "shelves": {"atlas"},
    "models": {"atlas"},
    "commands.comparing": {"atlas"},
    "commands.questions": {"atlas.questions"},
    "commands.running": {"atlas"},
    "cli_inputs": {"atlas"},
    "recipes": {"atlas"},
}
ATLAS_KNOWS = {"errors", "typed_json", "tensor_files", "scores", "questions", "contrasts"}
# its dictionaries are made and judged on the hook points
DICTIONARY_MAKERS = {
    "atlas.crosscoder_weights",
    "atlas.dictionary_activations",
    "atlas.dictionary_cards",
    "atlas.dictionary_losses",
    "atlas.dictionary_quality",
    "atlas.feature_labels",
    "atlas.train_crosscoder",
    "atlas.train_saes",
}
MAKERS_KNOW = ATLAS_KNOWS | {
    *("models", "identity", "lean", "executors", "activations"),
    *("dictionaries", "crosscoders", "crosscoder_files", "sae_files"),
}

# one door each
DOORS = {
    "transformer_lens": {"models"},
    "sae_lens": {"saes", "atlas.train_saes"},
    "optuna": {"search"},
    "scipy": {"statistics", "controls"},
    "sklearn": {"methods.dsas", "methods.iti"},
    "pandas": {"results"},
    "plotly": {
        *{"pictures", "run_plots", "feature_plots", "delta_plots", "tuning_plots", "token_plots"},
        *{"report_page", "method_plots", "front_plots", "suggestion_plots"},
    },
    "jinja2": {"report_page"},
    "rich": {"tables", "results"},
    "tqdm": {"progress"},
    "ipywidgets": {"panel"},
    "typer": {
        *{"cli", "cli_options", "commands.running", "commands.tuning", "commands.features"},
        *{"commands.questions", "commands.comparing", "commands.exporting"},
        *{"commands.suggesting"},
    },
    "gguf": {"gguf_files"},
    "inspect_ai": {"llm_judge", "inspect_models", "inspect_tasks"},
    "nltk": {"published"},
    "huggingface_hub": {"hub"},
    "pydantic": {"typed_json"},
    "pydantic_core": {"typed_json"},
    "neuronpedia": {"feature_labels"},
}


def module_name(path: Path) -> str:
    """`deltas`, `atlas.world`, `atlas`; the package root is the empty name."""
    return (
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").strip(".")
    )


SOURCES = {module_name(path): path.read_text("utf-8") for path in sorted(ROOT.rglob("*.py"))}
MODULES = sorted(name for name in SOURCES if name)
FLAT = [name for name in MODULES if name.split(".")[0] != "atlas"]
ATLAS = [name for name in MODULES if name.split(".")[0] == "atlas"]


@cache
def imports(source: str) -> set[str]:
    """Full names of all modules a source imports, at any depth; `.` begins a relative one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports, named as above."""
    prefix = "fusion_lens."
    return {full.removeprefix(prefix) for full in imports(SOURCES[name]) if full.startswith(prefix)}


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import optuna.samplers as samplers
from fusion_lens.plans import Plan
if TYPE_CHECKING:
    from . import hooks
def late():
    import transformer_lens
    from ..models import load_model
"""
    expected = {"optuna.samplers", "fusion_lens.plans", ".", "transformer_lens", "..models"}
    assert imports(source) == expected


def test_every_module_has_its_layer() -> None:
    assert set(FLAT) == LAYER.keys()
    assert "world" in {name.removeprefix("atlas.") for name in ATLAS}


@pytest.mark.parametrize("name", FLAT)
def test_a_module_imports_only_from_the_layers_below(name: str) -> None:
    for imported in own_imports(name):
        if imported.split(".")[0] == "atlas":
            assert imported in ATLAS_USERS.get(name, set())
        else:
            assert LAYER[imported] < LAYER[name], f"{name} must not import {imported}"


@pytest.mark.parametrize("name", ATLAS)
def test_atlas_stands_beside_the_layers(name: str) -> None:
    outside = {imported for imported in own_imports(name) if imported.split(".")[0] != "atlas"}
    assert outside <= (MAKERS_KNOW if name in DICTIONARY_MAKERS else ATLAS_KNOWS)


def test_what_the_layers_take_from_atlas_imports_nothing_of_the_package() -> None:
    assert own_imports("atlas") == set()


@pytest.mark.parametrize("name", MODULES)
def test_nobody_imports_the_package_root_or_by_a_relative_name(name: str) -> None:
    found = imports(SOURCES[name])
    assert "fusion_lens" not in found
    assert not {full for full in found if full.startswith(".")}


@pytest.mark.parametrize("package", DOORS)
def test_a_package_has_one_door(package: str) -> None:
    users = {
        name
        for name, source in SOURCES.items()
        if any(full.split(".")[0] == package for full in imports(source))
    }
    assert users == DOORS[package]


def test_importing_the_package_loads_no_heavy_one() -> None:
    code = (
        "import sys, fusion_lens; "
        "heavy = {'transformer_lens', 'sae_lens', 'transformers', 'plotly', 'ipywidgets', "
        "'pydantic'}; "
        "print(sorted(heavy & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "[]\n"
