"""A training run <-> one safetensors file, from which it goes on as if never interrupted.

The file holds the weights, the optimisers' moments, and in its header the number of steps done and
the configuration. Without dropout a run draws no other random numbers than those of its steps.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fusion_lens.errors import ConfigError


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
    """
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if json.loads(header["config"]) != config:
        raise ConfigError(
            f"a run must go on with the configuration it began with, but {path} has "
            f"{header['config']} and this run {json.dumps(config)}; use an empty folder."
        )
    with torch.no_grad():
        for name, weights in model.named_parameters():
            weights.copy_(tensors[f"model/{name}"])
    moments: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in optimizers]
    for key, tensor in tensors.items():
        if key.startswith("optimizer/"):
            _, number, index, name = key.split("/")
            moments[int(number)].setdefault(int(index), {})[name] = tensor
    for optimizer, state in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(header["step"])
