"""A training run <-> one safetensors file, from which it goes on as if never interrupted.

The file holds the weights, the optimisers' moments, and in its header the number of steps done and
the configuration. Without dropout a run draws no other random numbers than those of its steps.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fusion_lens.errors import ConfigError, InputFileError
from fusion_lens.tensor_files import header_of
from fusion_lens.typed_json import parsed, typed


def save_state(
    path: Path,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    step: int,
    config: dict[str, int | float],
) -> None:
    """Write the state after `step` steps; the file is whole or absent, never torn."""
    tensors = {f"model/{name}": weights.detach() for name, weights in model.named_parameters()}
    for number, optimizer in enumerate(optimizers):
        for index, moments in optimizer.state_dict()["state"].items():
            for name, moment in moments.items():
                tensors[f"optimizer/{number}/{index}/{name}"] = moment
    temporary = path.with_suffix(".part")
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        temporary,
        {"step": str(step), "config": json.dumps(config)},
    )
    temporary.replace(path)


def load_state(
    path: Path,
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    config: dict[str, int | float],
) -> int:
    """Put a saved state into `model` and `optimizers`; gives the steps done, 0 without a file.

    Raises:
        ConfigError: if the state was made with another configuration.
        InputFileError: if the file is damaged, or of another model or other optimisers.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            header = header_of(path, file)
            tensors = {name: file.get_tensor(name) for name in header.shapes}
        told = header.metadata
        step, made_with = typed(int, parsed(told["step"])), parsed(told["config"])
    except InputFileError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        reason = f"must be the whole state of a training run, but: {error!r}"
        raise InputFileError(path, reason) from error
    if made_with != config:
        raise ConfigError(
            f"a run must go on with the configuration it began with, but {path} has "
            f"{told['config']} and this run {json.dumps(config)}; use an empty folder."
        )
    weights = dict(model.named_parameters())
    for name, own in weights.items():
        _require(path, tensors, f"model/{name}", own)
    moments: list[dict[int, dict[str, torch.Tensor]]] = []
    for number, optimizer in enumerate(optimizers):
        parameters = [own for group in optimizer.param_groups for own in group["params"]]
        moments.append({})
        for index, own in enumerate(parameters):
            begin = f"optimizer/{number}/{index}/"
            for name in _MOMENTS[type(optimizer)]:
                like = own.new_zeros((), dtype=torch.float32) if name == "step" else own
                moment = _require(path, tensors, begin + name, like)
                if name == "step" and float(moment) != step:
                    reason = f"{begin}step must be {step} as in the header, but is {moment}"
                    raise InputFileError(path, reason)
                moments[number].setdefault(index, {})[name] = moment
    with torch.no_grad():
        for name, own in weights.items():
            own.copy_(tensors[f"model/{name}"])
    for optimizer, state in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return step


_MOMENTS: dict[type[torch.optim.Optimizer], tuple[str, ...]] = {
    torch.optim.AdamW: ("step", "exp_avg", "exp_avg_sq"),
    torch.optim.Muon: ("momentum_buffer",),
}


def _require(
    path: Path, tensors: dict[str, torch.Tensor], name: str, like: torch.Tensor
) -> torch.Tensor:
    """The tensor of a name, which must be as `like` is."""
    tensor = tensors.get(name)
    if tensor is None:
        raise InputFileError(path, f"must hold {name}, but does not; begin in an empty folder")
    if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
        raise InputFileError(
            path,
            f"{name} must be {like.dtype} of {tuple(like.shape)}, "
            f"but is {tensor.dtype} of {tuple(tensor.shape)}",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise InputFileError(path, f"{name} must be finite, but holds NaN or infinity")
    return tensor
