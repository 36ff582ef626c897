"""The config of an SAE, as sae-lens writes it (cfg.json) -> its `Card`, or why it is no dictionary.

What is read here holds for every SAE, whoever reads its weights. Refused is what is no dictionary
of the residual stream after one block, and what leaves open what its codes depend on: sae-lens
itself would encode without a scale that was never folded in, and say nothing. Knows no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from fusion_lens.dictionaries import Card, hook_notes, resid_post_layer
from fusion_lens.errors import DictionaryError

T = TypeVar("T")

OWN_ARCHITECTURES = ("standard", "topk", "jumprelu")
ARCHITECTURES = (*OWN_ARCHITECTURES, "gated", "abstopk", "matching_pursuit")

_MAJOR = re.compile(r"[0-9]{1,4}(?![0-9])")
_NORMALISATIONS = ("none", "layer_norm", "constant_norm_rescale")
_UNFOLDED = {
    "expected_average_only_in": "the average scale is not in the file",
    "covariance_whitening": "the whitening is not in the file",
}
_TRAINING = ("batchtopk", "matryoshka_batchtopk")
_NEUTRAL_OPTIONS = frozenset(
    {
        *("fold_ln", "center_unembed", "fold_value_biases", "refactor_factored_attn_matrices"),
        *("dtype", "torch_dtype", "device", "n_devices", "device_map", "move_to_device"),
        *("default_prepend_bos", "default_padding_side", "attn_implementation", "cache_dir"),
        *("trust_remote_code", "local_files_only", "low_cpu_mem_usage", "token"),
    }
)
_CHECKPOINT_OPTIONS = frozenset({"revision", "checkpoint_index", "checkpoint_value"})


def read_card(config: Mapping[str, Any], *, name: str) -> Card:
    """What a sae-lens config (cfg.json of version 6, or `sae.cfg.to_dict()`) says.

    Raises:
        DictionaryError: if the config is not of a dictionary of the residual stream after one
            block, or leaves open what its codes depend on.
    """
    require_dictionary(config, name=name)
    metadata = metadata_of(config)
    hook_names = (metadata["hook_name"],)
    options = _optional(metadata, "model_from_pretrained_kwargs", dict) or {}
    mode = config.get("normalize_activations", "none")
    if mode not in _NORMALISATIONS:
        reason = _UNFOLDED.get(str(mode), "that is not known")
        raise DictionaryError(
            f"{name} must be normalised by one of {', '.join(_NORMALISATIONS)}, but got {mode!r}: "
            f"{reason}; fold it into the weights and save again."
        )
    return Card(
        name=name,
        layers=(resid_post_layer(hook_names[0]),),
        hook_names=hook_names,
        d_model=_size(config, "d_in", name),
        d_sae=_size(config, "d_sae", name),
        basis="centred" if options.get("center_writing_weights") else "unprocessed",
        model_name=_optional(metadata, "model_name", str),
        prepend_bos=_optional(metadata, "prepend_bos", bool),
        trained_on_bos=_trained_on_bos(metadata),
        weights=_optional(metadata, "model_weights", str),
        embedding=_optional(metadata, "model_embedding", str),
        neuronpedia_id=_optional(metadata, "neuronpedia_id", str),
        notes=(*hook_notes(hook_names), *_checkpoint_notes(options, name)),
    )


def require_dictionary(config: Mapping[str, Any], *, name: str) -> None:
    """Refuse, from the config alone, what is no dictionary of one residual.

    Raises:
        DictionaryError: with the reason.
    """
    architecture, metadata = config.get("architecture"), metadata_of(config)
    hook, hook_out = metadata.get("hook_name"), metadata.get("hook_name_out")
    reason = None
    if not isinstance(architecture, str):
        reason = "its config names no architecture"
    elif "transcoder" in architecture or hook_out not in (None, hook):
        reason = (
            f"it is a transcoder ({architecture}), which predicts one activation from another: its "
            "reconstruction is not of what it reads, so it has no error at this site"
        )
    elif architecture == "temporal":
        reason = (
            "it is a temporal SAE, whose codes depend on the whole sequence before a token: "
            "it is no dictionary of one residual"
        )
    elif architecture in _TRAINING:
        reason = (
            f"it is a training checkpoint ({architecture}), whose codes depend on the batch; save "
            "it with save_inference_model"
        )
    elif architecture not in ARCHITECTURES:
        reason = f"its architecture is {architecture!r}, and {', '.join(ARCHITECTURES)} are known"
    elif not isinstance(hook, str):
        reason = "its config names no hook"
    elif metadata.get("hook_head_index") is not None or (
        config.get("reshape_activations", "none") != "none"
    ):
        reason = f"it reads attention heads at {hook}"
    if reason is not None:
        raise DictionaryError(f"{name} must be an SAE of the residual stream, but {reason}.")
    resid_post_layer(str(hook))


def is_current(config: Mapping[str, Any]) -> bool:
    """Whether sae-lens 6 or later wrote it; before, `metadata` stood at the top level."""
    found = _MAJOR.match(str(metadata_of(config).get("sae_lens_version", "")))
    return found is not None and int(found[0]) >= 6


def metadata_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Where a config keeps what it says about model and training; empty if it has none.

    Raises:
        DictionaryError: if it is no JSON object.
    """
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise DictionaryError(f"metadata must be a JSON object, but got {metadata!r}.")
    return metadata


def flag(config: Mapping[str, Any], key: str, *, absent: bool) -> bool:
    """What a config says under `key`, `absent` where it says nothing.

    Raises:
        DictionaryError: if it is no truth value.
    """
    value = config.get(key, absent)
    if not isinstance(value, bool):
        raise DictionaryError(f"{key} must be true or false, but got {value!r}.")
    return value


def _size(config: Mapping[str, Any], key: str, name: str) -> int:
    size = config.get(key)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DictionaryError(f"{key} of {name} must be a positive integer, but got {size!r}.")
    return size


def _optional(metadata: Mapping[str, Any], key: str, kind: type[T]) -> T | None:
    value = metadata.get(key)
    if value is not None and not isinstance(value, kind):
        raise DictionaryError(f"{key} must be a {kind.__name__}, but got {value!r}.")
    return value


def _trained_on_bos(metadata: Mapping[str, Any]) -> bool | None:
    excluded, positions = metadata.get("exclude_special_tokens"), metadata.get("seqpos_slice")
    first = positions[0] if isinstance(positions, list | tuple) and positions else None
    prepended = _optional(metadata, "prepend_bos", bool)
    if prepended is False or excluded is True or first:
        return False
    # a list of token numbers says nothing without the tokenizer
    return None if excluded else prepended


def _checkpoint_notes(options: Mapping[str, Any], name: str) -> tuple[str, ...]:
    known = _NEUTRAL_OPTIONS | _CHECKPOINT_OPTIONS | {"center_writing_weights"}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise DictionaryError(
            f"{name} must be of a model opened in a known way, but it was opened with "
            f"{', '.join(unknown)}, and whether that changes the residual stream is not known."
        )
    chosen = {key: value for key, value in options.items() if key in _CHECKPOINT_OPTIONS}
    return tuple(f"trained on the model's {key} {value}" for key, value in chosen.items())
