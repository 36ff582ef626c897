"""SAEs by name or folder: the only door to sae-lens.

A published SAE is RELEASE/ID of sae-lens' directory (`gpt2-small-res-jb/blocks.8.hook_resid_pre`),
or a hub repository and a folder in it. A local folder of an architecture that `sae_files` reads
needs no sae-lens. What a dictionary is, sae-lens computes: `encode` and `decode` are its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.dictionaries import Card, Dictionary, Encoded, checked_input
from fusion_lens.errors import (
    DictionaryError,
    FusionLensError,
    InputFileError,
    MissingExtraError,
    one_of,
)
from fusion_lens.sae_configs import (
    OWN_ARCHITECTURES,
    flag,
    is_current,
    read_card,
    require_dictionary,
)
from fusion_lens.sae_files import (
    CONFIG,
    Statistics,
    load_sae_folder,
    read_weights,
    require_directions,
    statistics,
)
from fusion_lens.tensor_files import read_config, require_finite

READERS = ("auto", "own", "sae-lens")

_FLAGS = ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm")


@final
@dataclass(frozen=True, slots=True, eq=False)
class SaeLensSAE:
    """An inference SAE of sae-lens behind the protocol.

    `sae.encode` leaves the statistics of its input on the module and `sae.decode` deletes them, so
    the two are called as a pair, and `encode` here takes the statistics from the input itself. One
    object must not be used from two threads.
    """

    card: Card
    sae: Any
    decoder: Float[Tensor, "layer d_sae d_model"] = field(init=False)

    def __post_init__(self) -> None:
        weight = self.sae.W_dec.detach()
        if getattr(self.sae.cfg, "rescale_acts_by_decoder_norm", False):
            weight = weight / torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        require_directions(self.card, weight)
        object.__setattr__(self, "decoder", weight[None])

    def to_basis(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        return x.detach().to(self.decoder)

    def encode(self, x: Float[Tensor, "batch layer d_model"]) -> Encoded:
        inputs, used = self._inputs(x)
        with torch.no_grad():
            codes = self.sae.encode(inputs)
        return Encoded(
            codes=codes,
            scale=used.scale_out,
            offset=(self._bias * used.scale_out + used.mean)[:, None],
        )

    def reconstruct(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> Float[Tensor, "batch layer d_model"]:
        inputs, _ = self._inputs(x)
        with torch.no_grad():
            decoded: Tensor = self.sae.decode(self.sae.encode(inputs))
        return decoded[:, None]

    @property
    def _bias(self) -> Float[Tensor, " d_model"]:
        bias: Tensor = self.sae.b_dec.detach()
        # a matching pursuit adds its bias only where it has subtracted it
        tied = self.sae.cfg.architecture() == "matching_pursuit"
        return torch.zeros_like(bias) if tied and not self.sae.cfg.apply_b_dec_to_input else bias

    def _inputs(
        self, x: Float[Tensor, "batch layer d_model"]
    ) -> tuple[Float[Tensor, "batch d_model"], Statistics]:
        inputs = checked_input(self.card, self.decoder, x)[:, 0]
        return inputs, statistics(self.sae.cfg.normalize_activations, inputs)


def load_sae(source: str | Path, *, reader: str = "auto", device: str = "cpu") -> Dictionary:
    """Open an SAE in float32.

    `source` is a folder that sae-lens saved, or RELEASE/ID, downloaded by sae-lens on first use.
    `reader` "auto" takes sae-lens only where it is needed: for a name, and for the architectures
    gated, abstopk and matching_pursuit. `fit_to_model` checks the SAE against a model.

    Raises:
        MissingExtraError: if sae-lens is needed and not installed.
        InputFileError: if a file is missing, damaged, or holds other tensors than its config says.
        DictionaryError: if there is no such SAE, or it is no dictionary of the residual stream
            after one block.
    """
    one_of("reader", reader, READERS)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if reader == "own" or str(source).startswith(("/", ".", "~")):
            raise DictionaryError(f"{source} must be a folder with an SAE, but there is none.")
        return _from_directory(str(source), device)
    if reader == "own" or (reader == "auto" and _is_own(read_config(folder / CONFIG))):
        return load_sae_folder(folder, device=device)
    return _from_folder(folder, device)


def _is_own(config: Mapping[str, Any]) -> bool:
    return is_current(config) and config.get("architecture") in OWN_ARCHITECTURES


def _from_folder(folder: Path, device: str) -> SaeLensSAE:
    from_disk = _sae_class().load_from_disk
    config = read_config(folder / CONFIG)
    name = folder.resolve().name
    if is_current(config):
        require_dictionary(config, name=name)
        for key in _FLAGS:
            flag(config, key, absent=False)
    # sae-lens would make room for whatever size the config says, and load NaN as it is
    size: dict[str, Any] = {"W_dec": (config.get("d_sae"), config.get("d_in"))}
    read_weights(folder, config, lambda header: {**header.shapes, **size}, device="cpu")
    with _quiet():
        try:
            sae = from_disk(folder, device=device, dtype="float32")
        except Exception as error:  # it raises whatever its many loaders meet
            raise InputFileError(
                folder, f"it must hold an SAE that sae-lens can open, but: {_line(error)}"
            ) from error
    return _wrapped(sae, name)


def _from_directory(source: str, device: str) -> SaeLensSAE:
    sae_class = _sae_class()
    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    release, sae_id = _release(source)
    with _quiet():
        try:
            # the config first: a transcoder is gigabytes
            config = load_sae_config_from_huggingface(release, sae_id)
            require_dictionary(config, name=source)
            sae = sae_class.from_pretrained(release, sae_id, device=device, dtype="float32")
        except FusionLensError:
            raise
        except Exception as error:  # the hub, requests and sae-lens each have their own
            raise DictionaryError(
                f"{source} must be a folder, or RELEASE/ID of an SAE that sae-lens can fetch, "
                f"but: {_line(error)}"
            ) from error
    return _wrapped(sae, source)


def _release(source: str) -> tuple[str, str]:
    """Release and id; a release has no slash, a hub repository one, an id any number."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory()
    first, _, rest = source.partition("/")
    if first in known and rest:
        if rest not in known[first].saes_map:
            close = get_close_matches(rest, list(known[first].saes_map), n=3)
            hint = f" Did you mean {', '.join(close)}?" if close else ""
            raise DictionaryError(f"{first} must have the SAE that is asked for, {rest!r}.{hint}")
        return first, rest
    if source.count("/") >= 2:
        owner, repository, folder = source.split("/", 2)
        return f"{owner}/{repository}", folder
    close = get_close_matches(first, list(known), n=3)
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    raise DictionaryError(
        f"{source} must be a folder, RELEASE/ID of sae-lens' directory or OWNER/REPOSITORY/FOLDER "
        f"of the hub, but none of these fits.{hint}"
    )


def _wrapped(sae: Any, name: str) -> SaeLensSAE:
    require_finite(name, {key: value.detach() for key, value in sae.state_dict().items()})
    sae.eval()
    return SaeLensSAE(read_card(sae.cfg.to_dict(), name=name), sae)


def _sae_class() -> Any:
    try:
        from sae_lens import SAE
    except ImportError as error:
        raise MissingExtraError("sae-lens", "sae") from error
    return SAE


@contextmanager
def _quiet() -> Iterator[None]:
    """Without sae-lens' advice to open the model in the SAE's basis: `fit_to_model` maps it."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r"\s*This SAE has non-empty", category=UserWarning
        )
        yield


def _line(error: Exception) -> str:
    # PyTorch puts what does not fit into the second line
    lines = [line.strip() for line in str(error).strip().splitlines()[:2]]
    return " ".join((type(error).__name__, *lines))
