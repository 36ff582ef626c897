"""The matrix products of a piece of work, recorded and done again with nothing between them.

Every `mm`, `addmm`, `bmm` and `baddbmm` that PyTorch runs is noted with the shapes and strides of
its operands; a replay runs the same products on the model's own parameters (so that they come from
memory as they do in the work itself) and on buffers of the same shapes for everything else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.bmm.default: torch.bmm,
    torch.ops.aten.baddbmm.default: torch.baddbmm,
}


class Products(TorchDispatchMode):
    """Inside `with Products(parameters) as products:` products are noted; `replay` runs them."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self._operands: dict[tuple[Any, ...], Tensor] = {}
        self._calls: list[tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            self._calls.append((_PRODUCTS[func], tuple(self._operand(arg) for arg in args)))
        return func(*args, **(kwargs or {}))

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def flops(self) -> int:
        """Multiplications and additions of all products."""
        return sum(2 * operands[-2].numel() * operands[-1].shape[-1] for _, operands in self._calls)

    def replay(self) -> None:
        """All products in their order."""
        for product, operands in self._calls:
            product(*operands)

    def _operand(self, tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() in self._parameters:
            return tensor
        key = (tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in self._operands:
            base = torch.randn_like(tensor)
            strided = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
            self._operands[key] = strided.copy_(base)
        return self._operands[key]
