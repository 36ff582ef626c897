"""The only door to TransformerLens: open a model, name its hooks, run one pass.

Anything with TransformerLens hook points is accepted as it is: a `TransformerBridge` (3.x, 4.x) or
the older `HookedTransformer`. `load_model` opens a bridge with unprocessed weights, the basis of
Hugging Face.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fusion_lens.atlas import CHECKPOINT
from fusion_lens.errors import HookNameError, ModelError, one_of
from fusion_lens.hub import find_checkpoint, opening
from fusion_lens.quantisation import DTYPES, load_quantised

SITES = ("resid_post", "attn_z", "mlp_out")

RESID_POST = "blocks.{layer}.hook_resid_post"
"""The hook name of the residual stream after a block."""

Place = tuple[str, int]
"""A site and a layer."""


@runtime_checkable
class HookedModel(Protocol):
    """What the package and its pages ask of a model; `TransformerBridge` and `HookedTransformer`
    offer it.

    Their `hook_dict` is not among it: a bridge makes it anew whenever it is asked for, which a
    check against this protocol would do.
    """

    cfg: Any
    tokenizer: Any

    def hooks(self, fwd_hooks: Any = ...) -> AbstractContextManager[Any]: ...

    def run_with_cache(self, *args: Any, **kwargs: Any) -> Any: ...

    def parameters(self) -> Iterator[Tensor]: ...

    def modules(self) -> Iterator[torch.nn.Module]: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


def load_model(
    name_or_path: str | Path | None = None,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    device_map: str | Mapping[str, str | int] | None = None,
) -> HookedModel:
    """Open a model as a `TransformerBridge` with unprocessed weights.

    None is Atlas, the model that ships with the package; else a local checkpoint folder or a hub
    name. With `load_in_8bit` the matrices inside the blocks are bitsandbytes' LLM.int8, with
    `load_in_4bit` its NF4 (both also on a CPU, see `quantisation`), and `dtype` is that of
    everything else, in 4-bit that of the products too. Without a `dtype`: float32, or float16 in
    8-bit, which is what LLM.int8 multiplies in, or bfloat16 in 4-bit. `device_map` spreads the
    blocks over several devices, in the place of `device`: "auto", "balanced", or modules and where
    they go, as `from_pretrained` takes it. Quantised models and those of a map are run by their
    hook points.

    Raises:
        ModelError: if it cannot be found or opened, `dtype` is no floating torch dtype, both
            `device` and `device_map` or both `load_in_8bit` and `load_in_4bit` are given, it does
            not run quantised in that `dtype`, or it reads more than text and torchvision is not
            installed.
        MissingExtraError: if it is to be quantised and bitsandbytes is not installed.
    """
    if load_in_8bit and load_in_4bit:
        raise ModelError(
            "weights must be in 8 bits or in 4, but got both load_in_8bit and load_in_4bit; leave "
            "one out."
        )
    bits = 8 if load_in_8bit else 4 if load_in_4bit else None
    torch_dtype = _floating(dtype or ("float32" if bits is None else DTYPES[bits]))
    if device is not None and device_map is not None:
        raise ModelError(
            f"a model is on one device or spread by a map, but got {device!r} and {device_map!r}; "
            "leave one out."
        )
    given = str(CHECKPOINT if name_or_path is None else name_or_path)
    source = find_checkpoint(given, revision)
    with _quiet_import():
        from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    with opening(str(name_or_path), local=Path(source).is_dir()):
        _check_processor(source, revision)
        options: dict[str, Any] = {"device": device, "dtype": torch_dtype, "device_map": device_map}
        if bits is not None:
            module = load_quantised(
                source,
                bits=bits,
                revision=revision,
                device_map=device_map or device or _default_device(),
                dtype=torch_dtype,
            )
            options = {"hf_model": module}
        model = TransformerBridge.boot_transformers(
            source,
            # left out, it means that transformers asks at the terminal
            tokenizer=AutoTokenizer.from_pretrained(
                source, revision=revision, trust_remote_code=False
            ),
            revision=revision,
            trust_remote_code=False,
            **options,
        )
        model.train(False)
        if bits is not None:
            _check_quantised(model, bits, torch_dtype)
    folder = Path(source)
    named = folder.resolve().name if folder.is_dir() else source
    model.cfg.model_name = "atlas" if name_or_path is None else named
    return model  # type: ignore[no-any-return]


def load_text_model(
    name_or_path: str | Path,
    *,
    device: str | None = None,
    dtype: str | torch.dtype = "float32",
) -> tuple[Any, Any]:
    """A causal language model of transformers without hook points, and its tokenizer.

    Raises:
        ModelError: if it cannot be found or opened, or `dtype` is no floating torch dtype.
    """
    torch_dtype = _floating(dtype)
    source = find_checkpoint(str(name_or_path))

    from transformers import AutoModelForCausalLM, AutoTokenizer

    with opening(str(name_or_path), local=Path(source).is_dir()):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch_dtype, trust_remote_code=False
        )
    return model.to(device or _default_device()).eval(), tokenizer


def architecture_of(name_or_path: str | Path | None = None) -> str:
    """What transformers calls the architecture of a checkpoint, as "llama" or "gemma2", from its
    config alone; None is Atlas.

    Raises:
        ModelError: if it cannot be found or read.
    """
    given = str(CHECKPOINT if name_or_path is None else name_or_path)
    source = find_checkpoint(given)

    from transformers import AutoConfig

    with opening(given, local=Path(source).is_dir()):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    return str(config.model_type)


def resid_post(layer: int) -> str:
    """The hook name of the residual stream after block `layer`."""
    return RESID_POST.format(layer=layer)


def site_hook(model: HookedModel, site: str, layer: int) -> str:
    """The hook name of a site: "resid_post", "attn_z" (the heads' outputs before the output
    projection) or "mlp_out" (the MLP's own output, before any norm behind it). It may be a name
    that the model does not have.

    Raises:
        ConfigError: if there is no such site.
        ModelError: if a `HookedTransformer` has a norm between the MLP and its `hook_mlp_out`.
    """
    if one_of("site", site, SITES) == "resid_post":
        return resid_post(layer)
    if site == "attn_z":
        return attn_z(layer)
    if type(model).__name__ != "HookedTransformer":
        # where the linear maps stand in the block itself, as OPT's, the MLP's own hook never runs
        whole = getattr(block_parts(model).get("mlp"), "name", None)
        return f"blocks.{layer}.mlp.{'hook_out' if whole else 'out.hook_out'}"
    if getattr(model.cfg, "use_normalization_before_and_after", False):
        raise ModelError(
            "mlp_out must be the MLP's own output, but HookedTransformer's hook_mlp_out is behind "
            f"a norm on {model.cfg.model_name}; open the model with load_model."
        )
    return f"blocks.{layer}.hook_mlp_out"


def block_parts(model: HookedModel) -> Mapping[str, Any]:
    """What a bridge names of a block, such as "attn" and "mlp": components with a `name` in Hugging
    Face's module (None: no module of its own) and `submodules`."""
    parts: Mapping[str, Any] = model.adapter.component_mapping["blocks"].submodules  # type: ignore[attr-defined]
    return parts


def attn_z(layer: int) -> str:
    """The hook name of the attention heads' outputs, "batch pos head d_head"."""
    return f"blocks.{layer}.attn.hook_z"


def check_hook_names(model: HookedModel, names: list[str]) -> None:
    """Make sure each hook exists.

    Raises:
        HookNameError: for the first that does not. A bridge would ignore it and run unsteered.
    """
    known = _hook_points(model)
    for name in names:
        if name not in known:
            raise HookNameError(name, known)


def is_hooked(model: HookedModel) -> bool:
    """Whether somebody has hooks on the model: on a hook point, or PyTorch's on a module.

    Both wrappers and transformers put hooks of their own on modules; those do not count.
    """
    if any(
        not _of_wrapper(handle)
        for point in _hook_points(model).values()
        for handle in (*point.fwd_hooks, *point.bwd_hooks)
    ):
        return True
    return any(
        not str(getattr(hook, "__module__", "")).startswith(("transformers.", "transformer_lens."))
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    )


def _of_wrapper(handle: Any) -> bool:
    """Whether a bridge put it there when it was made: TransformerLens 4 hangs the names of an MLP
    without a module of its own, OPT's, on those of its linear maps."""
    made_by = str(getattr(handle.user_hook, "__module__", ""))
    return handle.is_permanent and made_by.startswith("transformer_lens.")


def stop_tokens(model: HookedModel) -> frozenset[int]:
    """The tokens that end a text: the tokenizer's and the checkpoint's own."""
    config = getattr(getattr(model, "original_model", None), "generation_config", None)
    declared = getattr(config, "eos_token_id", None)
    ids = declared if isinstance(declared, list) else [declared]
    return frozenset(i for i in (*ids, model.tokenizer.eos_token_id) if i is not None)


def decode(model: HookedModel, tokens: Sequence[int]) -> str:
    """The text of tokens, special ones left out."""
    text: str = model.tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def token_texts(model: HookedModel, tokens: Sequence[int]) -> tuple[str, ...]:
    """What each token adds to the text, special ones included.

    Decoded alone, a token may lose the space it begins with. A character that several tokens spell
    is told by the last of them.
    """
    texts, told = [], ""
    for stop in range(1, len(tokens) + 1):
        whole = str(model.tokenizer.decode(tokens[:stop], clean_up_tokenization_spaces=False))
        if whole.endswith("\ufffd") and stop < len(tokens):
            texts.append("")
            continue
        longer = whole.startswith(told)
        texts.append(
            whole[len(told) :] if longer else str(model.tokenizer.decode(tokens[stop - 1 : stop]))
        )
        told = whole
    return tuple(texts)


@contextmanager
def evaluating(model: HookedModel) -> Iterator[None]:
    """No gradients and no dropout inside; every module's mode is given back as it was."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def differentiating(model: HookedModel) -> Iterator[None]:
    """As `evaluating`, with gradients, of which none reaches the model's own parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@dataclass(slots=True)
class KeyValues:
    """The key-value cache of one running batch: the wrapper's own object behind one name."""

    store: Any = None


def forward(
    model: HookedModel,
    tokens: Int[Tensor, "batch new"],
    mask: Int[Tensor, "batch pos"],
    *,
    cache: KeyValues | None = None,
    last: int = 0,
) -> Float[Tensor, "batch kept d_vocab"]:
    """Logits of one pass over `tokens`, the last `new` of `pos` positions; the rest is in `cache`.

    `mask` is 0 at left padding. Only the `last` positions' logits are given; 0: all of them.
    """
    if type(model).__name__ == "HookedTransformer":
        logits = _hooked_transformer_forward(model, tokens, mask, cache)
    else:
        logits = _bridge_forward(model, tokens, mask, cache, last)
    return logits[:, -last:]


def _hook_points(model: Any) -> Mapping[str, Any]:
    return model.hook_dict  # type: ignore[no-any-return]


@contextmanager
def _quiet_import() -> Iterator[None]:
    """transformer-lens imports bitsandbytes wherever it is installed, and that tells which kernels
    it lacks, whether or not anything is quantised."""
    log = logging.getLogger("bitsandbytes")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _check_processor(source: str, revision: str | None) -> None:
    """Refuse a model that reads images too where TransformerLens would have pip install what its
    processor needs: that replaces packages of the environment, torch among them, without a word.

    Raises:
        ModelError: if torchvision cannot be imported.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    if config.get_text_config() is config:
        return
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a build for another torch raises what it likes
        raise ModelError(
            f"torchvision must be installed for a {config.model_type} model: it reads more than "
            f"text, but importing torchvision gave {type(error).__name__}; install the build that "
            f"fits torch {torch.__version__}, or open a checkpoint of the text model alone."
        ) from error


def _check_quantised(model: Any, bits: int, dtype: torch.dtype) -> None:
    """Run one token: norms without weights, OLMo's, do not know which dtype quantised matrices
    want, and end in float32.

    Raises:
        ModelError: if something has to be multiplied by another dtype.
    """
    try:
        with torch.no_grad():
            model(torch.zeros((1, 1), dtype=torch.long, device=next(model.parameters()).device))
    except RuntimeError as error:
        if "dtype" not in str(error):
            raise
        told = str(dtype).removeprefix("torch.")
        raise ModelError(
            f"a {model.original_model.config.model_type} model in {bits} bits must run with all "
            f"else in {told}, but: {str(error).splitlines()[0]}; take float32 (--dtype float32)."
        ) from error


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _floating(dtype: str | torch.dtype) -> torch.dtype:
    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ModelError(
            f"dtype must be a floating torch dtype such as float32, but got {dtype!r}."
        )
    return named


def _bridge_forward(
    model: Any, tokens: Tensor, mask: Tensor, cache: KeyValues | None, last: int
) -> Tensor:
    options: dict[str, Any] = {"attention_mask": mask, "use_cache": cache is not None}
    if cache is not None and cache.store is not None:
        options["past_key_values"] = cache.store
    if last and "logits_to_keep" in inspect.signature(model.original_model.forward).parameters:
        options["logits_to_keep"] = last
    logits, store = model(tokens, return_type="logits_and_cache", **options)
    if cache is not None:
        cache.store = store
    return logits  # type: ignore[no-any-return]


def _hooked_transformer_forward(
    model: Any, tokens: Tensor, mask: Tensor, cache: KeyValues | None
) -> Tensor:
    options: dict[str, Any] = {}
    if cache is not None:
        if cache.store is None:
            from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

            cache.store = TransformerLensKeyValueCache.init_cache(
                model.cfg, model.cfg.device, tokens.shape[0]
            )
        options["past_kv_cache"] = cache.store
    return model(tokens, attention_mask=mask[:, -tokens.shape[1] :], **options)  # type: ignore[no-any-return]
