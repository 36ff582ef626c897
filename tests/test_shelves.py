from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import deltas_of
from crosscoders import made

from fusion_lens.atlas import DICTIONARIES
from fusion_lens.attribution import attribute
from fusion_lens.crosscoder_files import load_crosscoder, save_crosscoder
from fusion_lens.errors import DictionaryError, InputFileError
from fusion_lens.models import HookedModel
from fusion_lens.plans import make_plan
from fusion_lens.prompts import question_prompt
from fusion_lens.shelves import Explainer, Label, Shelved, open_dictionaries, read_labels
from fusion_lens.teacher_forcing import Text

SAE = DICTIONARIES / "sae_layer_2"
COLUMNS = ["label", "kind", "precise"]


def test_atlas_sae_is_one_of_every_layer_in_their_order(atlas: HookedModel) -> None:
    shelved = open_dictionaries(["atlas-sae"], atlas)
    assert [each.dictionary.card.layers for each in shelved] == [(layer,) for layer in range(6)]
    assert [each.dictionary.card.name for each in shelved] == [f"sae_layer_{i}" for i in range(6)]
    assert all(each.labels for each in shelved)


def test_atlas_crosscoder_is_one_over_all_layers(atlas: HookedModel) -> None:
    (shelved,) = open_dictionaries(["atlas-crosscoder"], atlas)
    assert shelved.dictionary.card.layers == tuple(range(6))
    assert len(shelved.labels) == 831


def test_names_are_opened_in_the_order_given(atlas: HookedModel) -> None:
    shelved = open_dictionaries(["atlas-crosscoder", str(SAE)], atlas)
    assert [each.dictionary.card.name for each in shelved] == ["crosscoder", "sae_layer_2"]
    assert shelved[1].labels == read_labels(SAE)


def test_a_label_that_does_not_hold_elsewhere_ends_in_a_question_mark(atlas: HookedModel) -> None:
    (shelved,) = open_dictionaries([str(SAE)], atlas)
    card = json.loads((SAE / "card.json").read_text("utf-8"))
    assert sum(label.precise for label in shelved.labels.values()) == card["labels"]["precise"]
    assert len(shelved.labels) == card["labels"]["live"]
    for feature, label in shelved.labels.items():
        assert label.text
        assert shelved.texts[feature] == (label.text if label.precise else f"{label.text}?")
    by_hand = {3: Label("month May", "entity", True), 5: Label("' lake'", "token", False)}
    assert Shelved(shelved.dictionary, by_hand).texts == {3: "month May", 5: "' lake'?"}


def test_a_crosscoder_is_opened_by_its_folder_or_its_file(
    atlas: HookedModel, tmp_path: Path
) -> None:
    shipped = DICTIONARIES / "crosscoder"
    by_folder, by_file = open_dictionaries([str(shipped), f"{shipped}/model.safetensors"], atlas)
    assert by_folder.dictionary.card == by_file.dictionary.card
    assert by_folder.labels == by_file.labels != {}
    save_crosscoder(load_crosscoder(shipped), tmp_path)
    (unlabelled,) = open_dictionaries([str(tmp_path)], atlas)
    assert unlabelled.labels == unlabelled.texts == {}


def test_a_place_where_nothing_is_or_something_else_is_refused(
    atlas: HookedModel, tmp_path: Path
) -> None:
    with pytest.raises(DictionaryError, match="nowhere must be a folder with an SAE"):
        open_dictionaries(["./nowhere"], atlas)
    with pytest.raises(InputFileError, match=r"cfg\.json: it must be readable"):
        open_dictionaries([str(tmp_path)], atlas)


@pytest.mark.parametrize("name", ["atlas-sae", "atlas-crosscoder"])
def test_another_model_is_refused(name: str, other_atlas: HookedModel, tiny: HookedModel) -> None:
    with pytest.raises(DictionaryError, match=r"must be used on the checkpoint .* 7d7a61ba19ff"):
        open_dictionaries([name], other_atlas)
    with pytest.raises(DictionaryError, match="must be used on a model of width 192"):
        open_dictionaries([name], tiny)


def test_a_crosscoder_of_the_users_must_fit_as_well(atlas: HookedModel, tmp_path: Path) -> None:
    save_crosscoder(made(), tmp_path)
    with pytest.raises(DictionaryError, match="must be used on a model of width 12"):
        open_dictionaries([str(tmp_path)], atlas)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        json.dumps({"columns": COLUMNS}),
        json.dumps({"columns": COLUMNS, "rows": 3}),
        json.dumps({"columns": COLUMNS, "rows": [["May", "entity"]]}),
        json.dumps({"columns": ["label", "kind"], "rows": [["May", "entity"]]}),
        json.dumps({"columns": COLUMNS, "rows": [["May", "entity", "false"]]}),
        json.dumps({"columns": COLUMNS, "rows": [[5, "entity", True]]}),
        json.dumps({"columns": COLUMNS, "rows": [["May", None, True]]}),
        "[" * 100_000,
    ],
)
def test_malformed_labels_are_refused(content: str, atlas: HookedModel, tmp_path: Path) -> None:
    folder = shutil.copytree(SAE, tmp_path / "sae")
    (folder / "labels.json").write_text(content, "utf-8")
    with pytest.raises(InputFileError, match=r"labels\.json: must hold labels of features"):
        open_dictionaries([str(folder)], atlas)


def test_features_without_a_label_keep_their_place(tmp_path: Path) -> None:
    rows = [[None, None, False, 1], ["May", "entity", True, 2]]
    content = json.dumps({"columns": [*COLUMNS, "more"], "rows": rows})
    (tmp_path / "labels.json").write_text(content, "utf-8")
    assert read_labels(tmp_path) == {1: Label("May", "entity", True)}


def test_an_explainer_gives_the_largest_features_with_their_labels(atlas: HookedModel) -> None:
    shelved = open_dictionaries(["atlas-crosscoder"], atlas)
    plan = make_plan(deltas_of(atlas), 0.5)
    text = Text(question_prompt(atlas, "Who wrote the red book?"), (40, 41), plan)
    (found,) = attribute(atlas, [shelved[0].dictionary], [text])
    explain = Explainer(atlas, shelved, k=3)
    (features,) = explain([text])
    assert features == found.top(3, {"crosscoder": shelved[0].texts})
    assert len(features) == 3
    assert any(each.label for each in features)
    told = explain.content["crosscoder"]
    for other in (
        replace(shelved[0].dictionary, encoder_bias=shelved[0].dictionary.encoder_bias + 0.1),
        replace(shelved[0].dictionary, decoder_weight=shelved[0].dictionary.decoder_weight * 1.1),
    ):
        changed = replace(shelved[0], dictionary=other)
        assert Explainer(atlas, [changed], k=3).content["crosscoder"] != told
    unlabelled = replace(shelved[0], labels={})
    assert Explainer(atlas, [unlabelled], k=3).content["crosscoder"] != told
    assert Explainer(atlas, shelved).content != explain.content
    assert Explainer(atlas, shelved, k=3).content == explain.content
