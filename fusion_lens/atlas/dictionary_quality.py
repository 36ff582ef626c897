"""Measure the shipped dictionaries on text of people who were held out of their training.

    python -m fusion_lens.atlas.dictionary_quality

For each dictionary, from the shipped files, over the tokens of held-out documents without BOS:

- variance explained, per layer: 1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2
- L0: mean number of features on; dead: share of features that are never on
- loss recovered, per layer: (ablated - spliced) / (ablated - clean), the mean next-token losses of
  Atlas with the layer's residuals replaced by their mean over the held-out tokens, by their
  reconstructions, and as they are (see `dictionary_losses`)
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.atlas import CHECKPOINT, DICTIONARIES
from fusion_lens.atlas.corpus import Document
from fusion_lens.atlas.decoding import load_completer
from fusion_lens.atlas.dictionary_activations import (
    TokenActivations,
    record_tokens,
    token_chunks,
    tokenize_documents,
)
from fusion_lens.atlas.dictionary_cards import load_card, open_dictionary, save_card
from fusion_lens.atlas.dictionary_losses import spliced_losses
from fusion_lens.atlas.dictionary_text import draw_side_documents, make_side
from fusion_lens.atlas.world import WORLD_SEED, make_world
from fusion_lens.dictionaries import Dictionary
from fusion_lens.models import HookedModel, load_model

N_DOCUMENTS = 2000
N_LOSS_DOCUMENTS = 600
SEED = 1


@dataclass(frozen=True, slots=True)
class LayerFigures:
    """One layer of a dictionary; losses in nats per token."""

    layer: int
    variance_explained: float
    loss_clean: float
    loss_spliced: float
    loss_ablated: float

    @property
    def loss_recovered(self) -> float:
        """1: the reconstruction costs nothing; 0: it is as bad as the mean."""
        return (self.loss_ablated - self.loss_spliced) / (self.loss_ablated - self.loss_clean)


@dataclass(frozen=True, slots=True)
class Figures:
    """A dictionary on held-out text."""

    n_tokens: int
    n_loss_tokens: int
    d_sae: int
    l0: float
    dead_share: float
    layers: tuple[LayerFigures, ...]

    def to_dict(self) -> dict[str, object]:
        """For a card, rounded."""
        return {
            "n_tokens": self.n_tokens,
            "n_loss_tokens": self.n_loss_tokens,
            "d_sae": self.d_sae,
            "l0": round(self.l0, 3),
            "dead_share": round(self.dead_share, 4),
            "layers": [
                {
                    **{name: round(value, 5) for name, value in asdict(layer).items()},
                    "loss_recovered": round(layer.loss_recovered, 5),
                }
                for layer in self.layers
            ],
        }


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """Held-out documents as token rows, and the residuals of all their tokens."""

    rows: list[list[int]]
    activations: TokenActivations


def held_out_documents(n: int, seed: int = SEED) -> list[Document]:
    """`n` documents of the held-out side, Atlas' own completions among them."""
    side = make_side(make_world(WORLD_SEED), "held_out")
    return draw_side_documents(side, n, seed=seed, complete=load_completer(CHECKPOINT))


def record_held_out(model: HookedModel, documents: Sequence[Document]) -> HeldOut:
    """Tokens and residuals of documents."""
    rows = tokenize_documents(model, documents)
    return HeldOut(rows, record_tokens(model, rows))


def measure(
    dictionaries: Mapping[str, Dictionary], model: HookedModel, text: HeldOut, *, n_loss: int
) -> dict[str, Figures]:
    """All figures of all dictionaries; losses over the first `n_loss` documents."""
    means = text.activations.resid.mean(dim=1)
    losses = spliced_losses(dictionaries, model, text.rows[:n_loss], means)
    figures = {}
    for name, dictionary in dictionaries.items():
        explained, l0, dead = reconstruction(dictionary, text.activations.resid)
        figures[name] = Figures(
            n_tokens=text.activations.resid.shape[1],
            n_loss_tokens=losses.n_tokens,
            d_sae=dictionary.card.d_sae,
            l0=l0,
            dead_share=dead,
            layers=tuple(
                LayerFigures(
                    layer, share, losses.clean, losses.spliced[name, layer], losses.ablated[layer]
                )
                for layer, share in zip(dictionary.card.layers, explained, strict=True)
            ),
        )
    return figures


def reconstruction(
    dictionary: Dictionary, resid: Float[Tensor, "layer token d_model"]
) -> tuple[list[float], float, float]:
    """Variance explained by layer, mean L0, and the share of features that are never on.

    `resid` holds all layers of the model.
    """
    card = dictionary.card
    centred = torch.stack(
        [(resid[layer] - resid[layer].mean(dim=0)).pow(2).sum() for layer in card.layers]
    )
    error = torch.zeros(len(card.layers))
    counts = torch.zeros(card.d_sae)
    for x in token_chunks(resid, card.layers):
        error += (x - dictionary.reconstruct(x)).pow(2).sum(dim=(0, 2))
        counts += (dictionary.encode(x).codes > 0).sum(dim=0)
    return (
        (1 - error / centred).tolist(),
        float(counts.sum()) / resid.shape[1],
        float((counts == 0).float().mean()),
    )


def format_figures(figures: Mapping[str, Figures]) -> str:
    """A table: one line for each layer of each dictionary."""
    lines = [f"{'dictionary':14}{'layer':>6}{'explained':>11}{'L0':>8}{'dead':>8}{'recovered':>11}"]
    for name, each in figures.items():
        for layer in each.layers:
            lines.append(
                f"{name:14}{layer.layer:6}{layer.variance_explained:11.4f}{each.l0:8.2f}"
                f"{each.dead_share:8.1%}{layer.loss_recovered:11.4f}"
            )
    n = {(each.n_tokens, each.n_loss_tokens) for each in figures.values()}
    lines += [f"{tokens:,} tokens, losses over {losses:,}" for tokens, losses in sorted(n)]
    return "\n".join(lines)


def shipped_dictionaries(folder: Path) -> list[Path]:
    """The folders with a card in `folder`, by name."""
    return sorted(path.parent for path in folder.glob("*/card.json"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON; with --update-cards, into the cards too."""
    parser = argparse.ArgumentParser(prog="python -m fusion_lens.atlas.dictionary_quality")
    parser.add_argument("--dictionaries", type=Path, default=DICTIONARIES)
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--n", type=int, default=N_DOCUMENTS, help="held-out documents")
    parser.add_argument("--n-loss", type=int, default=N_LOSS_DOCUMENTS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--update-cards", action="store_true")
    options = parser.parse_args(arguments)
    model = load_model()
    folders = shipped_dictionaries(options.dictionaries)
    cards = {folder.name: load_card(folder) for folder in folders}
    dictionaries = {folder.name: open_dictionary(folder, model) for folder in folders}
    text = record_held_out(model, held_out_documents(options.n, options.seed))
    figures = measure(dictionaries, model, text, n_loss=options.n_loss)
    print(format_figures(figures))
    record = {name: each.to_dict() for name, each in figures.items()}
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if options.update_cards:
        drawn = {"side": "held_out", "seed": options.seed, "n_documents": options.n}
        for folder in folders:
            held_out = {**drawn, **record[folder.name]}
            save_card(folder, {**cards[folder.name], "held_out": held_out})


if __name__ == "__main__":
    main()
