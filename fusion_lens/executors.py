"""One pass of a model, by its hook points or by its lean module.

Both executors take the same left-padded batch and do the same at every block. The hook points are
the reference; the lean module is compared with them once for every model, steered and cached,
and is not used where it differs, nor where somebody has hooks of their own on the model, which only
the hook points can run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.engine_log import out_of_memory
from fusion_lens.errors import ModelError, UnfitModelError, one_of
from fusion_lens.lean import (
    SITE_MODULES,
    AtBlock,
    AtSite,
    Lean,
    attention_masks,
    model_type,
    share,
    shares,
)
from fusion_lens.llama import MODEL_TYPES, LlamaPass
from fusion_lens.models import (
    HookedModel,
    KeyValues,
    Place,
    check_hook_names,
    evaluating,
    forward,
    is_hooked,
    site_hook,
)

MULTIPLE = 8
EXECUTORS = ("auto", "lean", "hooks")

_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-5}
_CLOSE_IN_HALF = 0.1


@runtime_checkable
class Executor(Protocol):
    """How a batch is run."""

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def multiple(self) -> int:
        """What lengths are padded to a multiple of."""
        ...

    def at_blocks(self, at: Mapping[int, AtBlock]) -> AbstractContextManager[None]:
        """Inside, `at[l]` is called with the residual stream after block `l`."""
        ...

    def at_sites(self, at: Mapping[Place, AtSite]) -> AbstractContextManager[None]:
        """Inside, `at[site, l]` is called with the activation at that site of block `l`; at
        "attn_z" with all heads' outputs in a row."""
        ...

    def forward(
        self,
        tokens: Int[Tensor, "batch new"],
        mask: Int[Tensor, "batch pos"],
        *,
        cache: KeyValues | None = None,
        last: int = 0,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Logits of one pass over `tokens`, the last `new` of `pos` positions; the rest is in
        `cache`.

        `mask` is 0 at left padding. Only the `last` positions' logits are given; 0: all of them.
        """
        ...


@dataclass(frozen=True, slots=True)
class HookPoints:
    """The model itself, through its hook points."""

    model: HookedModel
    name: str = "hooks"

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.model.parameters())).device

    @property
    def multiple(self) -> int:
        """Not padded in float64: Hugging Face's own softmax makes NaN of padding there."""
        wide = next(iter(self.model.parameters())).dtype == torch.float64
        return 1 if wide else MULTIPLE

    def at_blocks(self, at: Mapping[int, AtBlock]) -> AbstractContextManager[None]:
        """See `Executor`."""
        return self.at_sites({("resid_post", layer): act for layer, act in at.items()})

    def at_sites(self, at: Mapping[Place, AtSite]) -> AbstractContextManager[None]:
        """See `Executor`."""
        hooks = [(site_hook(self.model, *place), as_hook(act)) for place, act in at.items()]
        return hooked(self.model, hooks)

    def forward(
        self,
        tokens: Int[Tensor, "batch new"],
        mask: Int[Tensor, "batch pos"],
        *,
        cache: KeyValues | None = None,
        last: int = 0,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """See `Executor`."""
        return forward(self.model, tokens, mask, cache=cache, last=last)


@dataclass(frozen=True, slots=True)
class LeanModule:
    """The second module, on the same left-padded batches."""

    lean: Lean
    name: str = "lean"
    multiple: int = MULTIPLE

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.lean.device

    def at_blocks(self, at: Mapping[int, AtBlock]) -> AbstractContextManager[None]:
        """See `Executor`."""
        return self.lean.at_blocks(at)

    def at_sites(self, at: Mapping[Place, AtSite]) -> AbstractContextManager[None]:
        """See `Executor`."""
        return self.lean.at_sites(at)

    def forward(
        self,
        tokens: Int[Tensor, "batch new"],
        mask: Int[Tensor, "batch pos"],
        *,
        cache: KeyValues | None = None,
        last: int = 0,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """See `Executor`."""
        if cache is not None and cache.store is None:
            from transformers import DynamicCache

            # without the config: every layer keeps all positions, windows are in the mask
            cache.store = DynamicCache()
        columns = (mask.cumsum(dim=-1) - 1).masked_fill(mask == 0, -1)
        positions = columns[:, -tokens.shape[1] :]
        return self.lean.forward(
            tokens,
            positions.clamp(min=0),
            attention_masks(self.lean, positions, columns),
            cache=None if cache is None else cache.store,
            last=last,
        )


def executor_of(
    model: HookedModel, wanted: str = "auto", sites: Iterable[str] = ()
) -> tuple[Executor, str | None]:
    """The executor for what is done to a model at `sites`, and why it is not the lean one where
    that was not asked for.

    Raises:
        ConfigError: if `wanted` is no executor.
        UnfitModelError: if the lean one is wanted and cannot be had.
        HookNameError: if the model has no hook point at a site.
        ModelError: if what is done at its hook point there changes nothing.
    """
    one_of("executor", wanted, EXECUTORS)
    for site in sorted(sites):
        _check_hook_points(model, site)
    if wanted == "hooks":
        return HookPoints(model), None
    try:
        lean = lean_of(model)
        for site in sorted(sites):
            _check_site(lean, model, site)
        return LeanModule(lean), None
    except UnfitModelError as error:
        if wanted == "lean":
            raise
        return HookPoints(model), error.reason


def lean_of(model: HookedModel) -> Lean:
    """The model's lean module, made and verified when it is first asked for.

    Raises:
        UnfitModelError: if it cannot be made, computes something else than the hook points, or
            would leave out hooks that somebody has on the model.
    """
    if is_hooked(model):
        raise UnfitModelError("the model has hooks of its user's, which only hook points run")
    known = _KNOWN.get(model)
    if isinstance(known, str):
        raise UnfitModelError(known)
    if known is not None and shares(known, model):
        return known
    try:
        lean = share(model)
        if not _agrees(lean, model):
            raise UnfitModelError("its module computes something else than its hook points")
        if model_type(lean) in MODEL_TYPES:
            lean.written_out = LlamaPass(lean.module)
            if not _agrees(lean, model):
                lean.written_out = None
    except UnfitModelError as error:
        _KNOWN[model] = error.reason
        raise
    except Exception as error:  # a module of any architecture raises what it likes
        if out_of_memory(error):  # says nothing of the module: the next call may find more
            raise
        reason = _raised(error)
        _KNOWN[model] = reason
        raise UnfitModelError(reason) from error
    _KNOWN[model] = lean
    return lean


@contextmanager
def hooked(model: HookedModel, hooks: list[tuple[str, Any]]) -> Iterator[None]:
    """Add hooks whose names have been checked, and take away only these.

    Raises:
        HookNameError: if the model lacks one.
    """
    check_hook_names(model, [name for name, _ in hooks])
    if not hooks:
        yield
        return
    with model.hooks(fwd_hooks=hooks):
        yield


def as_hook(act: AtSite) -> Callable[..., Tensor | None]:
    """TransformerLens' `(activation, hook) -> activation`; heads are put in a row for `act`."""

    def run(x: Tensor, hook: Any = None) -> Tensor | None:
        changed = act(x.flatten(2))
        return None if changed is None else changed.reshape(x.shape)

    return run


def close(one: Tensor, other: Tensor) -> bool:
    """Whether two executors' logits agree, relative to the largest."""
    tolerance = _CLOSE.get(one.dtype, _CLOSE_IN_HALF)
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def probe_tokens(model: HookedModel, device: torch.device) -> Int[Tensor, "2 pos"]:
    """Two rows of some tokens, to compare executors on."""
    vocabulary = int(model.cfg.d_vocab)
    return (torch.arange(14, device=device).view(2, 7) * 37 + 11) % vocabulary


def probe_steering(n_layers: int) -> dict[int, AtBlock]:
    """A steering that moves every layer by half its own size, in other directions."""
    return dict.fromkeys(range(n_layers), lambda resid: resid + 0.5 * resid.roll(1, dims=-1))


def _check_hook_points(model: HookedModel, site: str) -> None:
    """Make sure that the hook points at a site act, each of them; tried once. A bridge may have
    hook points of parts that an architecture does not run, and would go on unsteered. (In 8-bit
    rows depend on each other: one dead layer among others is not seen there, a dead site is.)

    Raises:
        HookNameError: if the model lacks one.
        ModelError: if what is done at one does not reach the logits.
    """
    acting = _ACTING.setdefault(model, {"resid_post"})
    if site in acting:
        return
    points = HookPoints(model)
    n_layers = int(model.cfg.n_layers)
    # one row for each layer, which is steered there alone
    tokens = probe_tokens(model, points.device)[:1].repeat(n_layers, 1)
    mask = torch.ones_like(tokens)
    at = {
        (site, layer): partial(_in_row, layer, act)
        for (_, layer), act in _probe_at(model, site).items()
    }
    with evaluating(model):
        plain = points.forward(tokens, mask, last=1)
        with points.at_sites(at):
            steered = points.forward(tokens, mask, last=1)
    for layer in range(n_layers):
        if torch.equal(plain[layer], steered[layer]):
            raise ModelError(
                f"what is done at {site} must reach the logits, but "
                f"{site_hook(model, site, layer)} of {model.cfg.model_name} changes nothing; "
                "choose another site."
            )
    acting.add(site)


def _in_row(
    row: int, act: AtSite, x: Float[Tensor, "batch pos width"]
) -> Float[Tensor, "batch pos width"]:
    """What is done at a site, done to one row."""
    changed = act(x[row : row + 1])
    assert changed is not None
    return torch.cat([x[:row], changed, x[row + 1 :]])


def _probe_at(model: HookedModel, site: str) -> dict[Place, AtSite]:
    return {(site, layer): act for layer, act in probe_steering(int(model.cfg.n_layers)).items()}


def _check_site(lean: Lean, model: HookedModel, site: str) -> None:
    """Make sure that what is done at a site of the lean module is what hook points do; tried once.

    Raises:
        UnfitModelError: if the module does not name the site, or computes something else there.
    """
    if site not in lean.verified:
        lean.verified[site] = _why_unfit(lean, model, site)
    reason = lean.verified[site]
    if reason is not None:
        raise UnfitModelError(reason)


def _why_unfit(lean: Lean, model: HookedModel, site: str) -> str | None:
    if site not in lean.sites:
        return f"its blocks do not name their {SITE_MODULES[site]}"
    try:
        if _agrees(lean, model, site):
            return None
    except Exception as error:  # as in `lean_of`
        if out_of_memory(error):
            raise
        return _raised(error)
    return f"its module computes something else than its hook points at {site}"


def _raised(error: Exception) -> str:
    said = (str(error).splitlines() or ["nothing more"])[0]
    return f"its module gave {type(error).__name__}: {said}"


def _agrees(lean: Lean, model: HookedModel, site: str = "resid_post") -> bool:
    """Whether a padded, steered pass and a cached step give the hook points' logits."""
    tokens = probe_tokens(model, lean.device)
    mask = torch.ones_like(tokens)
    if lean.dtype != torch.float64:  # Hugging Face's own softmax makes NaN of padding there
        mask[0, :2] = 0
    steering = _probe_at(model, site)
    seen = []
    for executor in (HookPoints(model), LeanModule(lean)):
        cache = KeyValues()
        with evaluating(model), executor.at_sites(steering):
            first = executor.forward(tokens[:, :-1], mask[:, :-1], cache=cache, last=1)
            second = executor.forward(tokens[:, -1:], mask, cache=cache, last=1)
        seen.append(torch.stack([first, second]))
    return close(seen[1], seen[0])


# the lean module, or why there is none: not an exception, whose traceback would hold the model
_KNOWN: WeakKeyDictionary[HookedModel, Lean | str] = WeakKeyDictionary()
# the sites whose hook points were found to act
_ACTING: WeakKeyDictionary[HookedModel, set[str]] = WeakKeyDictionary()
