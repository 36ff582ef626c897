"""A second module that shares the model's tensors: Hugging Face's own, without hook points.

A `TransformerBridge` runs every activation through a hook point and forces a slow attention, so
that generation through it reaches about half the speed of its own module. `share` makes that module
anew around the very same parameters and buffers (no copy) and puts one hook behind every block,
where `blocks.l.hook_resid_post` is; one before the attention's output projection and one behind the
MLP are put there when something is first done at those sites. It serves every architecture whose
blocks the bridge names; what it computes is compared with the hook points once, when it is made.

Knows nothing of plans, prompts or decoding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.errors import UnfitModelError
from fusion_lens.llama import LlamaPass
from fusion_lens.models import HookedModel, Place, block_parts

AtBlock = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "batch pos d_model"] | None]
"""What is done to the residual stream after a block; None leaves it."""

AtSite = Callable[[Float[Tensor, "batch pos width"]], Float[Tensor, "batch pos width"] | None]
"""What is done to the activation at a site; None leaves it."""

SITE_MODULES = {"attn_z": "attention's output projection", "mlp_out": "MLP"}
"""The module that a site is the input ("attn_z") or the output ("mlp_out") of."""

_ATTENTION = "fusion_lens"
_ATTENDED = "_attends_in_fusion_lens"


@dataclass(slots=True, eq=False)
class Lean:
    """The shared module. `masks` names the kinds of attention mask it takes, with their windows
    (None: no window); a module with one kind takes it bare. `parts` are ids and types of the
    modules of the model it was made of, `shared` the places of its tensors there and here.
    `written_out` computes the same with fewer operations, for some families. `sites` are the
    modules of the sites inside a block, layer by layer, as far as they have a name. `slots_fit`
    remembers whether the module runs on a slot cache (None: not tried), `verified` what it was
    found to do wrong at a site (None: it agrees with the hook points)."""

    module: torch.nn.Module
    masks: Mapping[str, int | None]
    parts: tuple[tuple[int, type], ...] = ()
    shared: tuple[_Shared, ...] = ()
    written_out: LlamaPass | None = None
    sites: Mapping[str, tuple[torch.nn.Module, ...]] = field(default_factory=dict)
    slots_fit: bool | None = None
    verified: dict[str, str | None] = field(default_factory=lambda: {"resid_post": None})
    _at: Mapping[Place, AtSite] = field(default_factory=dict)
    _open: set[str] = field(default_factory=lambda: {"resid_post"})
    _batch_shape: torch.Size = field(default_factory=torch.Size)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return next(self.module.parameters()).dtype

    def at_blocks(self, at: Mapping[int, AtBlock]) -> AbstractContextManager[None]:
        """Inside, `at[l]` is called with the residual stream after block `l`."""
        return self.at_sites({("resid_post", layer): act for layer, act in at.items()})

    @contextmanager
    def at_sites(self, at: Mapping[Place, AtSite]) -> Iterator[None]:
        """Inside, `at[site, l]` is called with the activation at that site of block `l`."""
        for site in {site for site, _ in at} - self._open:
            self._put_hooks(site)
        before, self._at = self._at, at
        try:
            yield
        finally:
            self._at = before

    def forward(
        self,
        tokens: Int[Tensor, "batch new"],
        positions: Int[Tensor, "batch new"],
        mask: Float[Tensor, "#batch 1 new pos"] | Mapping[str, Tensor],
        *,
        cache: Any = None,
        last: int = 0,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Logits of the last `last` positions (0: all). `mask` is added to the attention scores, by
        kind where the module has several; `cache` is a transformers `Cache`."""
        self._batch_shape = tokens.shape
        if self.written_out is not None and isinstance(mask, Tensor):
            return self.written_out(
                tokens,
                positions,
                mask,
                cache=cache,
                last=last,
                at=self._at,
                attention=attention,
            )
        logits: Tensor = self.module(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=last,
        ).logits
        return logits

    def _put_hooks(self, site: str) -> None:
        for layer, module in enumerate(self.sites[site]):
            if site == "attn_z":
                module.register_forward_pre_hook(partial(self._before_module, (site, layer)))
            else:
                module.register_forward_hook(partial(self._behind_module, (site, layer)))
        self._open.add(site)

    def _before_module(self, place: Place, _module: Any, inputs: Any) -> Any:
        changed = self._acted(place, inputs[0])
        return None if changed is None else (changed, *inputs[1:])

    def _behind_module(self, place: Place, _module: Any, _inputs: Any, output: Any) -> Any:
        if not isinstance(output, tuple):
            return self._acted(place, output)
        changed = self._acted(place, output[0])
        return None if changed is None else (changed, *output[1:])

    def _acted(self, place: Place, x: Tensor) -> Tensor | None:
        act = self._at.get(place)
        if act is None:
            return None
        # OPT flattens batch and positions before its MLP
        changed = act(x.view(self._batch_shape + x.shape[-1:]))
        return None if changed is None else changed.reshape(x.shape)


def share(model: HookedModel) -> Lean:
    """A lean module around the tensors of a `TransformerBridge`.

    Raises:
        UnfitModelError: if the model is no bridge, or its module cannot be made again.
    """
    original = getattr(model, "original_model", None)
    if original is None:
        raise UnfitModelError(f"{type(model).__name__} has no Hugging Face module to share")
    if getattr(original, "hf_device_map", None) or getattr(original, "is_quantized", False):
        raise UnfitModelError("its weights are quantised or spread over devices")
    config = copy.deepcopy(original.config)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        module = type(original)(config)
    shared = tuple(_shared(original, module))
    for place in shared:
        place.lean[place.leaf] = place.model[place.leaf]
    missing = [name for name, tensor in _named(module).items() if tensor.is_meta]
    if missing:
        raise UnfitModelError(f"the bridge does not hold its tensor {missing[0]}")
    config._attn_implementation = _register_attention()
    module.train(False)
    lean = Lean(module, _masks(config.get_text_config()), _parts(model), shared)
    blocks = module.get_submodule(model.adapter.component_mapping["blocks"].name)  # type: ignore[attr-defined]
    if not isinstance(blocks, torch.nn.ModuleList) or len(blocks) != model.cfg.n_layers:
        raise UnfitModelError("its blocks are not one list of modules")
    for layer, block in enumerate(blocks):
        block.register_forward_hook(partial(lean._behind_module, ("resid_post", layer)))
    lean.sites = _site_modules(block_parts(model), blocks)
    return lean


def shares(lean: Lean, model: HookedModel) -> bool:
    """Whether the module still holds the model's own tensors, all of them, and no part of the
    model has been replaced."""
    return lean.parts == _parts(model) and all(
        place.lean[place.leaf] is place.model.get(place.leaf) for place in lean.shared
    )


def model_type(lean: Lean) -> str:
    """Transformers' name of the architecture."""
    return str(lean.module.config.model_type)  # type: ignore[union-attr]


def all_attend(lean: Lean, n_layers: int) -> bool:
    """Whether every layer has computed its attention here, not in a way of its own."""
    return sum(hasattr(module, _ATTENDED) for module in lean.module.modules()) == n_layers


def attention_masks(
    lean: Lean, allowed: Int[Tensor, "batch new"], columns: Int[Tensor, "#batch pos"]
) -> Tensor | dict[str, Tensor]:
    """Masks that let a query at position `allowed` see the columns of positions 0 to `allowed`.

    A column of a negative position is padding. Masked scores get the dtype's lowest number rather
    than -inf: a query that sees nothing then attends evenly, to no effect, instead of becoming NaN.
    """
    low = torch.finfo(lean.dtype).min
    masks = {}
    for kind, window in lean.masks.items():
        seen = (columns[:, None] <= allowed[..., None]) & (columns[:, None] >= 0)
        if window is not None:
            seen &= columns[:, None] > allowed[..., None] - window
        masks[kind] = torch.zeros(seen.shape, dtype=lean.dtype, device=seen.device).masked_fill_(
            ~seen, low
        )[:, None]
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _site_modules(
    named: Mapping[str, Any], blocks: torch.nn.ModuleList
) -> dict[str, tuple[torch.nn.Module, ...]]:
    """The modules of the sites inside every block, by the names that the bridge gives its parts."""
    attention, mlp = named.get("attn"), named.get("mlp")
    paths = {
        "attn_z": [attention, _part(attention, "o")],
        # an MLP without a module of its own is the last of its two linear maps
        "mlp_out": [mlp] if getattr(mlp, "name", None) else [_part(mlp, "out")],
    }
    found = {}
    for site, parts in paths.items():
        names = [getattr(part, "name", None) for part in parts]
        path = [name for name in names if isinstance(name, str)]
        if len(path) == len(parts):
            with suppress(AttributeError):
                found[site] = tuple(block.get_submodule(".".join(path)) for block in blocks)
    return found


def _part(component: Any, name: str) -> Any:
    return getattr(component, "submodules", {}).get(name)


@dataclass(frozen=True, slots=True)
class _Shared:
    """Where one tensor is registered: a module's parameters or buffers, in the model and in the
    lean module."""

    model: dict[str, Tensor | None]
    lean: dict[str, Tensor | None]
    leaf: str


def _shared(original: torch.nn.Module, module: torch.nn.Module) -> Iterator[_Shared]:
    """Where in `module` each tensor of the bridge's own belongs.

    A bridge may have tensors where the architecture has none, such as the bias of an unembedding:
    they belong where the module has room for them.
    """
    modules = dict(module.named_modules())
    for name, owner in original.named_modules(remove_duplicate=False):
        parent = modules.get(name.replace("_original_component", "").replace("..", ".").strip("."))
        if parent is not None:
            for mine in (owner._parameters, owner._buffers):
                for store in (parent._parameters, parent._buffers):
                    yield from (
                        _Shared(mine, store, leaf)
                        for leaf, tensor in mine.items()
                        if tensor is not None and leaf in store
                    )


def _parts(model: HookedModel) -> tuple[tuple[int, type], ...]:
    return tuple((id(module), type(module)) for module in model.modules())


def _named(module: torch.nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _masks(config: Any) -> dict[str, int | None]:
    """Kinds of mask and their windows.

    Raises:
        UnfitModelError: if a position's numbers depend on more than the positions before it.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        raise UnfitModelError("its rotary frequencies depend on the longest text of a batch")
    if getattr(config, "attention_chunk_size", None):
        raise UnfitModelError("its attention works in chunks")
    window = getattr(config, "sliding_window", None)
    kinds = tuple(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    if not kinds:
        return {"full_attention": window}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


def _register_attention() -> str:
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, attention)
    return _ATTENTION


def attention(
    module: Any,
    query: Float[Tensor, "batch head new d_head"],
    key: Float[Tensor, "batch group pos d_head"],
    value: Float[Tensor, "batch group pos d_value"],
    attention_mask: Float[Tensor, "#batch 1 new pos"],
    *,
    scaling: float,
    softcap: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch new head d_value"], None]:
    """softmax(scaling * q.k + mask) v with batched matrix products, in float32 at least.

    One query a row is the common case here, and there PyTorch's fused kernel takes 1.6 to 5 times
    as long on a CPU (docs/negative_results.md). Heads of one key group are one product.
    """
    unknown = [name for name in ("position_bias", "s_aux") if options.get(name) is not None]
    if unknown:
        raise UnfitModelError(f"its attention takes {unknown[0]}")
    if not hasattr(module, _ATTENDED):
        setattr(module, _ATTENDED, True)
    batch, heads, new, width = query.shape
    groups, pos = key.shape[1:3]
    query = (query * scaling).reshape(batch * groups, -1, width)
    scores = torch.bmm(query, key.reshape(batch * groups, pos, width).transpose(1, 2))
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.view(batch, heads, new, pos).add_(attention_mask)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(value.dtype)
    mixed = torch.bmm(
        weights.view(batch * groups, -1, pos), value.reshape(batch * groups, pos, value.shape[-1])
    )
    return mixed.view(batch, heads, new, -1).transpose(1, 2).contiguous(), None
