import json
from dataclasses import replace

import pytest
import torch
from dictionaries_by_hand import identity_sae
from safetensors.torch import load_file

from fusion_lens.atlas import DICTIONARIES
from fusion_lens.atlas.dictionary_cards import load_card, open_dictionary, sae_name
from fusion_lens.atlas.dictionary_quality import (
    Figures,
    LayerFigures,
    format_figures,
    main,
    measure,
    reconstruction,
    record_held_out,
    shipped_dictionaries,
)
from fusion_lens.atlas.dictionary_text import draw_side_documents, make_side
from fusion_lens.atlas.world import make_world

NAMES = ["crosscoder", *(sae_name(layer) for layer in range(6))]
CARDS = {name: load_card(DICTIONARIES / name) for name in NAMES}


@pytest.fixture(scope="module")
def remeasured(atlas):
    documents = draw_side_documents(make_side(make_world(0), "held_out"), 120, seed=7)
    dictionaries = {name: open_dictionary(DICTIONARIES / name, atlas) for name in NAMES}
    return measure(dictionaries, atlas, record_held_out(atlas, documents), n_loss=12)


def test_an_sae_for_every_layer_and_a_crosscoder_in_at_most_8_megabytes():
    assert [folder.name for folder in shipped_dictionaries(DICTIONARIES)] == NAMES
    assert sum(path.stat().st_size for path in DICTIONARIES.rglob("*")) <= 8_000_000
    for folder in shipped_dictionaries(DICTIONARIES):
        [path] = folder.glob("*.safetensors")
        matrices = sorted(load_file(path).values(), key=torch.Tensor.numel)[-2:]
        assert [matrix.dtype for matrix in matrices] == [torch.float16] * 2


@pytest.mark.parametrize("name", NAMES)
def test_the_cards_figures_meet_the_targets(name):
    figures = CARDS[name]["held_out"]
    assert figures["l0"] <= (32 if name == "crosscoder" else 16)
    assert figures["dead_share"] <= 0.1
    assert figures["n_tokens"] >= 50_000
    for layer in figures["layers"]:
        assert layer["variance_explained"] >= 0.93
        assert layer["loss_recovered"] >= 0.95


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_files_still_have_the_cards_figures_on_other_text(name, remeasured):
    recorded, got = CARDS[name]["held_out"], remeasured[name]
    assert got.l0 == pytest.approx(recorded["l0"], rel=0.05)
    for old, new in zip(recorded["layers"], got.layers, strict=True):
        assert new.layer == old["layer"]
        assert new.variance_explained == pytest.approx(old["variance_explained"], abs=0.01)
        assert new.loss_recovered == pytest.approx(old["loss_recovered"], abs=0.01)


def test_what_is_explained_is_relative_to_the_mean():
    resid = torch.randn(1, 50, 4, generator=torch.Generator().manual_seed(0)) + 5
    sae = identity_sae(4)
    assert reconstruction(sae, resid) == ([1.0], 4.0, 0.5)  # all positive: half are never on
    mean = replace(sae, threshold=torch.full((8,), 99.0), b_dec=resid[0].mean(dim=0))
    [explained], l0, dead = reconstruction(mean, resid)
    assert (explained, l0, dead) == (pytest.approx(0, abs=1e-6), 0.0, 1.0)


def test_the_table_has_a_line_for_each_layer():
    layer = LayerFigures(3, 0.95, loss_clean=1.0, loss_spliced=1.5, loss_ablated=6.0)
    figures = Figures(2000, 100, d_sae=8, l0=4.0, dead_share=0.25, layers=(layer,))
    assert layer.loss_recovered == 0.9
    table = format_figures({"sae_layer_3": figures}).splitlines()
    assert table[1].split() == ["sae_layer_3", "3", "0.9500", "4.00", "25.0%", "0.9000"]
    assert table[-1] == "2,000 tokens, losses over 100"


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    main(["--n", "12", "--n-loss", "2", "--out", str(tmp_path / "quality.json")])
    written = json.loads((tmp_path / "quality.json").read_text(encoding="utf-8"))
    assert sorted(written) == NAMES
    assert f"{written['crosscoder']['n_tokens']} tokens" in capsys.readouterr().out
