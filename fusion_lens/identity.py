"""Which model a tensor was made on: its weights, its wrapper, the basis of its residual stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fusion_lens.errors import ModelError
from fusion_lens.models import HookedModel, stop_tokens

_HASHED_ELEMENTS = 200_000


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Which model a tensor belongs to.

    `weights` is a SHA-256 over all parameters rounded to bfloat16, so that one checkpoint opened in
    float32 and in bfloat16 stays one model (float16 rounds otherwise and counts as another unless
    the checkpoint is in float16 itself). Of a parameter above 400,000 elements an even sample is
    hashed. `embedding` is the same over the token embedding alone, the one matrix that both
    wrappers store alike. `processing` is "unprocessed" or "processed" (folded or centred by
    TransformerLens: another basis of the residual stream).
    """

    name: str
    wrapper: str
    processing: str
    n_layers: int
    d_model: int
    dtype: str
    weights: str
    embedding: str

    def mismatch(self, other: ModelIdentity) -> str | None:
        """Why tensors of `self` must not be used on `other`; None if they may."""
        for field in ("d_model", "n_layers", "processing"):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                return f"{field} must be {mine}, but the model has {theirs}"
        compared = "weights" if self.wrapper == other.wrapper else "embedding"
        mine, theirs = getattr(self, compared), getattr(other, compared)
        if mine != theirs:
            return (
                f"it was made on {self.name} ({self.dtype}, {compared} {mine[:12]}), "
                f"but the model is {other.name} ({other.dtype}, {theirs[:12]})"
            )
        return None


def identify(model: HookedModel) -> ModelIdentity:
    """Hash and describe a model.

    Raises:
        ModelError: if it lacks what every TransformerLens model has.
    """
    if not isinstance(model, HookedModel):
        raise ModelError(
            "the model must offer TransformerLens hook points, "
            f"but got {type(model).__name__}; open it with load_model."
        )
    weights, embedding = _digests(model)
    return ModelIdentity(
        name=str(model.cfg.model_name),
        wrapper=type(model).__name__,
        processing=_processing(model),
        n_layers=int(model.cfg.n_layers),
        d_model=int(model.cfg.d_model),
        dtype=_dtype_of(model),
        weights=weights,
        embedding=embedding,
    )


def configuration(model: HookedModel) -> dict[str, Any]:
    """What else than its weights a model's text depends on, for the record of a run: its config,
    a digest of the tokenizer with its chat template, the tokens that end a text, and the kind of
    device."""
    config = getattr(getattr(model, "original_model", None), "config", None) or model.cfg
    content = json.loads(json.dumps(config.to_dict(), default=str))
    tokenizer = model.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spelt = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    told = json.dumps([spelt, getattr(tokenizer, "chat_template", None)], default=str)
    return {
        "config": {name: own for name, own in content.items() if name not in _NOT_CONFIG},
        "tokenizer": hashlib.sha256(told.encode()).hexdigest(),
        "stop_tokens": sorted(stop_tokens(model)),
        "device": next(iter(model.parameters())).device.type,
    }


def weights_digest(tensors: Iterable[Tensor]) -> str:
    """A SHA-256 over tensors as `ModelIdentity` has it: shapes, and numbers rounded to bfloat16, of
    large tensors an even sample."""
    digest = hashlib.sha256()
    for tensor in tensors:
        sample = _sampled(tensor).to("cpu", torch.bfloat16).contiguous()
        digest.update(str(tuple(tensor.shape)).encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_layer_normed(model: HookedModel) -> bool:
    """Whether LayerNorm, blind to the mean over d_model, reads the residual stream; RMSNorm is
    not."""
    kind = str(getattr(model.cfg, "normalization_type", None))
    return kind in ("LN", "LNPre") and not getattr(model.cfg, "final_rms", False)


def residual_basis(model: HookedModel) -> str:
    """The basis its residual stream is in: "centred" where TransformerLens has taken the mean over
    d_model out of all that is written to it, else "unprocessed".

    Only `center_writing_weights` does that, and only on a LayerNorm model. `fold_ln`,
    `center_unembed`, `fold_value_biases` and `refactor_factored_attn_matrices` change what is read
    from the stream, or move a constant from one write to another of the same block.
    """
    return "centred" if is_layer_normed(model) and _is_centred(model) else "unprocessed"


def _dtype_of(model: HookedModel) -> str:
    """As "float32", or "int8+float16" where some matrices are quantised."""
    names = {str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()}
    return "+".join(sorted(names, key=lambda name: (not name.startswith(("int", "uint")), name)))


def _processing(model: Any) -> str:
    if type(model).__name__ == "HookedTransformer":
        folded = str(model.cfg.normalization_type).endswith("Pre")
        return "processed" if folded or _is_centred(model) else "unprocessed"
    return "processed" if getattr(model, "_weights_processed", False) else "unprocessed"


def _is_centred(model: Any) -> bool:
    # weights are centred in float32 and rounded after that
    tolerance = max(1e-6, torch.finfo(model.W_E.dtype).eps / 8)
    embedding = model.W_E.float()
    return bool(embedding.mean(dim=-1).abs().max() < tolerance * embedding.abs().max())


def _digests(model: Any) -> tuple[str, str]:
    """Of all weights and of the embedding; hashed again only after a parameter has changed."""
    parameters = list(model.parameters())
    samples = [_sampled(parameter) for parameter in parameters]
    sums = [sample.view(_BITS[sample.element_size()]).sum() for sample in samples]
    state = (
        *((parameter.data_ptr(), parameter._version) for parameter in parameters),
        *torch.stack([total.to("cpu") for total in sums]).tolist(),
    )
    known = _DIGESTS.get(model)
    if known is None or known[0] != state:
        digests = weights_digest(parameters), weights_digest([model.W_E])
        known = _DIGESTS[model] = state, digests
    return known[1]


def _sampled(parameter: Tensor) -> Tensor:
    flat = parameter.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // _HASHED_ELEMENTS)]


# names and places; the dtype is the identity's
_NOT_CONFIG = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "device", "n_devices"),
    *("model_name", "tokenizer_name", "model_path"),
}
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_DIGESTS: WeakKeyDictionary[Any, tuple[tuple[Any, ...], tuple[str, str]]] = WeakKeyDictionary()
