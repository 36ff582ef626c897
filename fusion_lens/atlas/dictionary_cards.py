"""The cards of the shipped dictionaries: one `card.json` in each dictionary's folder.

A card names the model (with the hash of its weights), the hooks, the recipe, the hash of the
dictionary's own weights and, once judged, the figures on held-out text. A dictionary is used only
on the model of its card.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from fusion_lens.errors import InputFileError, ModelError
from fusion_lens.models import HookedModel, identify

CARD = "card.json"
CROSSCODER = "crosscoder"


def sae_name(layer: int) -> str:
    """The folder of a layer's SAE."""
    return f"sae_layer_{layer}"


def load_card(folder: Path) -> dict[str, Any]:
    """A dictionary's card.

    Raises:
        InputFileError: if there is none or it is no JSON object.
    """
    path = folder / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputFileError(path, f"it must be a dictionary's card, but: {error}") from error
    if not isinstance(card, dict):
        raise InputFileError(path, f"it must hold a JSON object, but got {type(card).__name__}")
    return card


def save_card(folder: Path, card: dict[str, Any]) -> None:
    """Write a card, with the hash of the weights that are in the folder now."""
    hashes = {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }
    card = {**card, "sha256": hashes}
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def require_model(card: dict[str, Any], model: HookedModel) -> None:
    """Make sure that the model is the card's.

    Raises:
        ModelError: if its weights have another hash.
    """
    wanted, got = card["model"]["weights"], identify(model).weights
    if wanted != got:
        raise ModelError(
            f"the dictionary must be used on the weights {wanted[:12]} it was trained on, "
            f"but the model has {got[:12]}; train dictionaries of that model."
        )
