"""The cards of the shipped dictionaries: one `card.json` in each dictionary's folder.

A card names the model (with the hash of its weights), the hooks, the recipe, the hash of the
dictionary's own weights and, once judged, the figures on held-out text.
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from fusion_lens.crosscoder_files import load_crosscoder
from fusion_lens.dictionaries import Dictionary, fit_to_model
from fusion_lens.errors import InputFileError
from fusion_lens.models import HookedModel
from fusion_lens.sae_files import load_sae_folder
from fusion_lens.typed_json import parsed

CARD = "card.json"
CROSSCODER = "crosscoder"


def sae_name(layer: int) -> str:
    """The folder of a layer's SAE."""
    return f"sae_layer_{layer}"


def load_card(folder: Path) -> dict[str, Any]:
    """A dictionary's card.

    Raises:
        InputFileError: if there is none, it is no JSON object, or it is the card of other weights
            than those beside it.
    """
    path = folder / CARD
    try:
        card = parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputFileError(path, f"it must be a dictionary's card, but: {error}") from error
    if not isinstance(card, dict):
        raise InputFileError(path, f"it must hold a JSON object, but got {type(card).__name__}")
    if card.get("sha256") != _hashes(folder):
        raise InputFileError(path, "it must be the card of the weights beside it; train them again")
    return card


def save_card(folder: Path, card: dict[str, Any]) -> None:
    """Write a card, with the hash of the weights that are in the folder now."""
    card = {**card, "sha256": _hashes(folder)}
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def open_dictionary(folder: Path, model: HookedModel) -> Dictionary:
    """The dictionary of a folder, on the model that it was trained on.

    Raises:
        InputFileError: if a file is missing or damaged.
        DictionaryError: if the model is another.
    """
    is_crosscoder = folder.name == CROSSCODER
    dictionary: Dictionary = load_crosscoder(folder) if is_crosscoder else load_sae_folder(folder)
    return fit_to_model(dictionary, model)


def _hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*.safetensors"))
    }
