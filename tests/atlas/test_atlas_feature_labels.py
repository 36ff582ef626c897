import json
from dataclasses import replace

import pytest
import torch
from dictionaries_by_hand import identity_sae

from fusion_lens.atlas import DICTIONARIES
from fusion_lens.atlas.concepts import concept_table
from fusion_lens.atlas.dictionary_cards import load_card
from fusion_lens.atlas.dictionary_quality import shipped_dictionaries
from fusion_lens.atlas.feature_labels import (
    FeatureLabel,
    LabelledText,
    is_precise,
    label_features,
    save_labels,
    summarise,
)
from fusion_lens.atlas.token_truth import KINDS
from fusion_lens.shelves import Label, read_labels

CONCEPTS = [("entity", "month May"), ("token", "' lake'")]


def text_of(rows):
    """Tokens of two units: (' May', ' lake'); each row is (unit 0, unit 1, token)."""
    tokens = {
        "May": {"entity": "month May", "token": "' May'"},
        "lake": {"token": "' lake'"},
        "the": {"token": "' the'"},
    }
    per_token = [tokens[token] for *_, token in rows]
    resid = torch.tensor([[list(row[:2]) for row in rows]])
    return LabelledText(
        resid, concept_table(per_token, CONCEPTS), [token["token"] for token in per_token]
    )


def written(folder):
    """All that is in a folder's labels.json: labels and summary."""
    content = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    rows = [dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    labels = [
        FeatureLabel(feature, **{**row, "top": tuple(row["top"])})
        for feature, row in enumerate(rows)
    ]
    return labels, content["summary"]


# unit 0 is on at May, a little at the; unit 1 is on at lake
TRAINING = text_of([(4.0, 0.0, "May"), (1.0, 0.0, "the"), (0.0, 2.0, "lake"), (3.0, 0.0, "May")])
# of 12 firings of unit 0 one is wrong, one May is missed; of unit 1 there are two
HELD_OUT = text_of(
    [(3.0, 0.0, "May")] * 11
    + [(2.5, 0.0, "the"), (1.9, 0.0, "May"), (0.0, 1.5, "lake"), (0.0, 1.5, "the")]
)


@pytest.fixture(scope="module")
def labels():
    return label_features(identity_sae(2), TRAINING, HELD_OUT, CONCEPTS)


def test_a_label_is_found_in_training_text_and_scored_on_held_out_text(labels):
    may, lake, *dead = labels
    assert (may.label, may.kind, may.n_firings) == ("month May", "entity", 12)
    assert may.precision == pytest.approx(11 / 12)
    assert may.recall == pytest.approx(11 / 12)
    assert may.precise
    assert may.top == ("' May'", "' the'")
    assert (lake.label, lake.kind, lake.n_firings) == ("' lake'", "token", 2)
    assert (lake.precision, lake.recall, lake.precise) == (0.5, 1.0, False)
    assert [(each.label, each.kind, each.n_firings, each.top) for each in dead] == [
        (None, None, 0, ())
    ] * 2


def test_the_summary_counts_live_scored_and_precise_features(labels):
    assert summarise(labels) == {
        "features": 4,
        "live": 2,
        "scored": 1,
        "precise": 1,
        "precise_of_the_world": 1,
        "precise_with_recall_half": 1,
        "by_kind": {"entity": 1},
    }


def test_few_firings_or_many_wrong_ones_are_not_precise():
    assert is_precise(0.9, n_firings=10)
    assert not is_precise(1.0, n_firings=9)
    assert not is_precise(0.89, n_firings=99)


def test_labels_are_read_as_they_were_written(labels, tmp_path):
    save_labels(labels, tmp_path)
    assert written(tmp_path)[0] == [
        replace(each, precision=round(each.precision, 3), recall=round(each.recall, 3))
        for each in labels
    ]
    assert read_labels(tmp_path) == {
        0: Label("month May", "entity", True),
        1: Label("' lake'", "token", False),
    }


@pytest.mark.parametrize("folder", shipped_dictionaries(DICTIONARIES), ids=lambda path: path.name)
def test_shipped_labels_are_one_a_feature_and_the_cards_summary_is_theirs(folder):
    labels, summary = written(folder)
    card = load_card(folder)
    assert len(labels) == card["held_out"]["d_sae"]
    assert {each.kind for each in labels} - {None} <= set(KINDS)
    assert summarise(labels) == summary == {key: card["labels"][key] for key in summary}
