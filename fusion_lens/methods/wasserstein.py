"""Two sets of numbers -> how far one must be moved to become the other, with gradients.

In one dimension the Wasserstein-1 distance is the area between the two quantile functions,

    W1(x, y) = integral over q in [0, 1] of |Q_x(q) - Q_y(q)|,

and a quantile function is the sorted values as steps of equal width (Peyré and Cuturi 2019,
"Computational Optimal Transport", section 2.6, arXiv 1803.00567).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def wasserstein(x: Float[Tensor, "n unit"], y: Float[Tensor, "m unit"]) -> Float[Tensor, " unit"]:
    """The distance of every unit's values in `x` from those in `y`, in the units of both; `n` and
    `m` may differ, and neither may be 0."""
    n, m = len(x), len(y)
    # q in steps of 1/(n*m), whole numbers, so that no two edges differ by rounding alone
    edges = torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]).sort().values.to(x.device)
    starts, widths = edges[:-1].clamp(max=n * m - 1), edges.diff().to(x) / (n * m)
    apart = x.sort(dim=0).values[starts // m] - y.sort(dim=0).values[starts // n]
    return (widths[:, None] * apart.abs()).sum(dim=0)
