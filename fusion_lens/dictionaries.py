"""Residuals -> sparse codes, behind one protocol: what a dictionary is, and which model it fits.

A dictionary reads the residual stream after one block or several and gives one code per feature:

    x_hat[l] = sum_i f_i(x) * scale[l](x) * d_i[l] + offset[l](x)

An SAE is the one-layer case of a crosscoder. `scale` and `offset` depend on the input only where
the dictionary normalises each input by its own statistics; without them the parts of a change do
not sum to it: feature i contributes `f(y)_i scale(y) d_i - f(x)_i scale(x) d_i` to the change from
x to y, and `offset(y) - offset(x)` belongs to no feature.

A dictionary speaks of one basis of the residual stream. `fit_to_model` maps what can be mapped and
refuses the rest. Knows no file and no library of dictionaries.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.errors import DictionaryError, one_of
from fusion_lens.identity import ModelIdentity, identify, is_layer_normed, residual_basis
from fusion_lens.models import HookedModel, check_hook_names, resid_post

BASES = ("unprocessed", "centred")

_BLOCK = re.compile(
    r"(?:blocks|model\.layers|transformer\.h|gpt_neox\.layers)\.(?P<block>0|[1-9]\d{0,3})"
    r"(?P<hook>\.hook_resid_post|\.hook_resid_pre|\.hook_out|\.hook_in)?"
)


@dataclass(frozen=True, slots=True)
class Card:
    """What a dictionary says about itself.

    `layers` are the blocks whose `resid_post` it reads, `hook_names` the hooks as it names them.
    `basis` is "unprocessed", the weights of Hugging Face, or "centred"
    (`center_writing_weights=True`). `trained_on_bos` and `prepend_bos` are None where it does not
    say. `weights` and `embedding` are those of the `ModelIdentity` it was trained on, where it
    says; a `model_name` is not compared, one model having many. `notes` tell what was mapped.
    """

    name: str
    layers: tuple[int, ...]
    hook_names: tuple[str, ...]
    d_model: int
    d_sae: int
    basis: str = "unprocessed"
    model_name: str | None = None
    prepend_bos: bool | None = None
    trained_on_bos: bool | None = None
    weights: str | None = None
    embedding: str | None = None
    neuronpedia_id: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        one_of("basis", self.basis, BASES)
        if not self.layers or list(self.layers) != sorted({*self.layers}) or self.layers[0] < 0:
            raise DictionaryError(
                f"layers must be blocks of one model in ascending order, but got {self.layers}."
            )
        if len(self.hook_names) != len(self.layers):
            raise DictionaryError(
                "there must be a hook name per layer, but got "
                f"{len(self.hook_names)} for {len(self.layers)} layers."
            )
        if min(self.d_model, self.d_sae) < 1:
            raise DictionaryError(
                f"d_model and d_sae must be at least 1, but got {self.d_model} and {self.d_sae}."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """Codes of a batch and what turns them into residuals: sum_i codes_i * scale * d_i + offset.

    `codes` are negative only where the dictionary's own activation allows it. `scale` is 1 and
    `offset` constant unless each input is normalised by its own statistics. `offset` is in residual
    units.
    """

    codes: Float[Tensor, "batch d_sae"]
    scale: Float[Tensor, "batch layer"]
    offset: Float[Tensor, "batch layer d_model"]


@runtime_checkable
class Dictionary(Protocol):
    """What attribution asks of an SAE or a crosscoder.

    All tensors live on the dictionary's device in its dtype, whatever the input's.
    """

    @property
    def card(self) -> Card:
        """What the dictionary says about itself."""

    @property
    def decoder(self) -> Float[Tensor, "layer d_sae d_model"]:
        """The directions d_i; `codes * scale` times their norm is in residual units."""

    def to_basis(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        """The model's residuals, or differences of them, in the dictionary's basis; linear."""

    def encode(self, x: Float[Tensor, "batch layer d_model"]) -> Encoded:
        """Codes of the model's residuals after the blocks `card.layers`; never of a bare delta.

        Raises:
            DictionaryError: if the input has other layers, another width, or is not finite.
        """

    def reconstruct(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        """`decode(encode(x))` as the dictionary itself computes it, without `Encoded`.

        `to_basis(x) - reconstruct(x)` is the error, found on its own: that effects, offset and
        error sum to a delta is then a test of the effects.
        """


def decode(dictionary: Dictionary, encoded: Encoded) -> Float[Tensor, "batch layer d_model"]:
    """`sum_i codes_i * scale * d_i + offset`, in the dictionary's basis."""
    weighted = torch.einsum("bf,lfd->bld", encoded.codes, dictionary.decoder)
    total: Tensor = weighted * encoded.scale[..., None] + encoded.offset
    return total


def resid_post_layer(hook_name: str) -> int:
    """The block after which a hook reads the residual stream.

    `blocks.N.hook_resid_pre` is `blocks.(N-1).hook_resid_post`. Hugging Face's module of block N
    (`model.layers.N`) gives the same residual.

    Raises:
        DictionaryError: for a hook elsewhere, or before the first block.
    """
    found = _BLOCK.fullmatch(hook_name)
    if found is None or (found["hook"] is None) == hook_name.startswith("blocks."):
        raise DictionaryError(
            "the hook must be a block's hook_resid_post or hook_resid_pre, "
            f"but got {hook_name!r}; what steering adds is in the residual stream, not there."
        )
    block = int(found["block"])
    layer = block - 1 if found["hook"] in (".hook_resid_pre", ".hook_in") else block
    if layer < 0:
        raise DictionaryError(
            f"the hook must lie after a block, but {hook_name!r} is the embedding, before all of "
            "them: nothing is steered there; choose a dictionary of a later layer."
        )
    return layer


def hook_notes(hook_names: tuple[str, ...]) -> tuple[str, ...]:
    """What `resid_post_layer` maps, in words."""
    posts = [(name, resid_post(resid_post_layer(name))) for name in hook_names]
    return tuple(f"{name} is read as {post}" for name, post in posts if name != post)


def checked_input(
    card: Card, decoder: Float[Tensor, "layer d_sae d_model"], x: Float[Tensor, "batch n width"]
) -> Float[Tensor, "batch n width"]:
    """`x` on the device and in the dtype of `decoder`.

    Raises:
        DictionaryError: if it does not have the card's layers and width, or is not finite.
    """
    expected = (len(card.layers), card.d_model)
    if tuple(x.shape[1:]) != expected:
        raise DictionaryError(
            f"{card.name} must be given {expected[0]} layer(s) of width {expected[1]}, "
            f"but got {tuple(x.shape[1:])}; take the residuals after the blocks {card.layers}."
        )
    x = x.detach().to(decoder)
    if not bool(torch.isfinite(x).all()):
        raise DictionaryError(f"{card.name} must be given finite residuals, but got NaN or inf.")
    return x


@final
@dataclass(frozen=True, slots=True, eq=False)
class Centred:
    """A dictionary of centred writing weights on a model that has none: the mean over d_model is
    taken from every residual first.

    On a LayerNorm model that is exactly what centring the weights does to the residual stream,
    whose every reader is blind to the mean. `to_basis` does the same to a delta; what it drops is
    in no effect and in no error.
    """

    inner: Dictionary

    @property
    def card(self) -> Card:
        note = "the mean over d_model is subtracted from residuals and deltas"
        return replace(self.inner.card, notes=(*self.inner.card.notes, note))

    @property
    def decoder(self) -> Float[Tensor, "layer d_sae d_model"]:
        return self.inner.decoder

    def to_basis(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        x = self.inner.to_basis(x)
        return x - x.mean(dim=-1, keepdim=True)

    def encode(self, x: Float[Tensor, "batch layer d_model"]) -> Encoded:
        return self.inner.encode(self.to_basis(x))

    def reconstruct(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        return self.inner.reconstruct(self.to_basis(x))


def fit_to_model(dictionary: Dictionary, model: HookedModel) -> Dictionary:
    """The dictionary as it reads this model's residuals.

    A dictionary of centred writing weights is wrapped in `Centred` on an unprocessed LayerNorm
    model; on an RMSNorm model TransformerLens centres nothing and there is nothing to do. The other
    options of TransformerLens leave the residual stream as it is (see `residual_basis`).

    Raises:
        DictionaryError: if width, layers, basis or, where the card names it, the checkpoint are
            not the model's.
        HookNameError: if the model lacks the hook of a layer.
    """
    card, identity = dictionary.card, identify(model)
    if card.d_model != identity.d_model:
        raise DictionaryError(
            f"{card.name} must be used on a model of width {card.d_model}, "
            f"but {identity.name} has {identity.d_model}."
        )
    if card.layers[-1] >= identity.n_layers:
        raise DictionaryError(
            f"{card.name} must be used on a model with a block {card.layers[-1]}, "
            f"but {identity.name} has {identity.n_layers} blocks."
        )
    check_hook_names(model, [resid_post(layer) for layer in card.layers])
    basis = residual_basis(model)
    if card.basis == "unprocessed" and basis == "centred":
        raise DictionaryError(
            f"{card.name} must read unprocessed residuals, but {identity.name} has centred writing "
            "weights and the mean they took out is lost; open the model with load_model."
        )
    _require_checkpoint(card, identity)
    if card.basis == basis or not is_layer_normed(model):
        return dictionary
    return Centred(dictionary)


def _require_checkpoint(card: Card, identity: ModelIdentity) -> None:
    plain = identity.wrapper == "TransformerBridge" and identity.processing == "unprocessed"
    compared = "weights" if plain or card.embedding is None else "embedding"
    named, found = getattr(card, compared), getattr(identity, compared)
    if named is not None and named != found:
        raise DictionaryError(
            f"{card.name} must be used on the checkpoint it was trained on ({card.model_name}, "
            f"{compared} {named[:12]}), but {identity.name} has {found[:12]}."
        )
