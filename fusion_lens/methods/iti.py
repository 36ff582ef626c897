"""ITI, inference-time intervention: the attention heads that tell true from false are moved.

At each head, with z its output before the output projection at the last token,

    theta = (mean(z+) - mean(z-)) / |mean(z+) - mean(z-)|
    sigma = the standard deviation of theta.z over the texts of both sides
    z <- z + alpha * sigma * theta      at the K heads whose probe is best

A probe is a logistic regression of the head's z, its accuracy the share of texts that it tells
rightly when fitted without their fold; no pair, and no group of pairs, is in two folds. The paper
(Li et al. 2023, arXiv 2306.03341) keeps K = 48 and steers with alpha = 15 from the last prompt
token on. Ties go to the lower layer, then the lower head.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import Tensor

from fusion_lens.errors import ActivationError, ConfigError
from fusion_lens.methods.checks import require_pairs, require_site
from fusion_lens.plans import Affine, Plan, full
from fusion_lens.prompts import NO_PROMPT
from fusion_lens.site_activations import SiteActivations

N_FOLDS = 5
LEAST_PAIRS = 2 * N_FOLDS
_MAX_ITER = 1000


@dataclass(frozen=True, slots=True, eq=False)
class Iti:
    """The plan, whose strength is alpha; every head's probe accuracy; and the (layer, head) that
    are moved, the best first."""

    plan: Plan
    accuracies: Float[Tensor, "layer head"]
    heads: tuple[tuple[int, int], ...]


def iti(
    true: SiteActivations,
    false: SiteActivations,
    n_heads: int,
    *,
    n_kept: int = 48,
    groups: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Iti:
    """Fitted on activations "text layer width" at "attn_z" whose rows are pairs; `width` is
    `n_heads` times d_head. The shift is in units of z.

    `groups` names what each pair is about (None: every pair is of its own); `seed` deals them to
    the folds. Where fewer than `n_kept` heads can be moved, all that can are. A head whose two
    means are equal, such as one that never changes, has no theta: its accuracy is 0.5 and it is
    never kept.

    Raises:
        ContrastError: if the rows are no pairs, or fewer than two for each fold.
        ActivationError: if they are of another site, the width is no multiple of `n_heads`, or no
            head has a theta.
        ConfigError: if `n_kept` is below 1, or `groups` has another length or fewer groups than
            folds.

    References:
        Li et al., Inference-Time Intervention: Eliciting Truthful Answers from a Language Model,
        arXiv 2306.03341.
    """
    require_pairs(true, false, least=LEAST_PAIRS)
    require_site(true, "attn_z")
    if n_kept < 1:
        raise ConfigError(f"n_kept must be at least 1, but got {n_kept}.")
    both = [_by_head(side, n_heads) for side in (true, false)]
    towards = both[0].mean(dim=0) - both[1].mean(dim=0)
    norms = towards.norm(dim=-1, keepdim=True)
    theta = torch.where(norms > 0, towards / norms, 0.0)
    z = torch.cat(both)
    sigma = torch.einsum("tlhd,lhd->tlh", z, theta).std(dim=0, correction=0)
    candidates = [(layer, head) for layer, head in (norms[..., 0] > 0).nonzero().tolist()]
    if not candidates:
        raise ActivationError(
            "the means of true and false must differ at a head, but are equal at all; "
            "take other pairs."
        )
    accuracies = torch.full_like(sigma, 0.5)
    numbered = _numbered(groups, len(true), seed)
    for layer, head in candidates:
        accuracies[layer, head] = _accuracy(z[:, layer, head], numbered)
    best = sorted(candidates, key=lambda place: -float(accuracies[place]))[:n_kept]
    shift = torch.zeros_like(theta)
    for place in best:
        shift[place] = sigma[place] * theta[place]
    return Iti(_plan(true, shift), accuracies, tuple(best))


def _by_head(side: SiteActivations, n_heads: int) -> Float[Tensor, "text layer head d_head"]:
    width = side.values.shape[2]
    if n_heads < 1 or width % n_heads:
        raise ActivationError(
            f"the width at attn_z must be a multiple of n_heads, but got ({width=}, {n_heads=}); "
            "give the model's cfg.n_heads."
        )
    n_texts, n_layers, _ = side.values.shape
    return side.values.double().reshape(n_texts, n_layers, n_heads, -1)


def _numbered(
    groups: Sequence[Hashable] | None, n_pairs: int, seed: int
) -> Int[np.ndarray, " text"]:
    """The group of every text, those of the true side first. Groups of one size are dealt to the
    folds by their numbers, which are drawn."""
    groups = range(n_pairs) if groups is None else groups
    names = list(dict.fromkeys(groups))
    if len(groups) != n_pairs or len(names) < N_FOLDS:
        raise ConfigError(
            f"groups must name one of at least {N_FOLDS} groups for each of the {n_pairs} pairs, "
            f"but got {len(groups)} names of {len(names)} groups."
        )
    drawn = np.random.default_rng(seed).permutation(len(names))
    number = dict(zip(names, drawn, strict=True))
    return np.array([number[name] for name in groups] * 2)


def _accuracy(z: Float[Tensor, "text d_head"], groups: Int[np.ndarray, " text"]) -> float:
    """The share of held-out texts that a probe tells rightly; the first half of them is true."""
    is_true = np.arange(len(z)) < len(z) // 2
    probe, cv = LogisticRegression(max_iter=_MAX_ITER), GroupKFold(N_FOLDS)
    told = cross_val_predict(probe, z.numpy(), is_true, groups=groups, cv=cv)
    return float((told == is_true).mean())


def _plan(side: SiteActivations, shift: Float[Tensor, "layer head d_head"]) -> Plan:
    own = shift.flatten(start_dim=1).to(side.values.dtype)
    step = Affine(
        site="attn_z",
        scale=torch.zeros_like(own),
        shift=own,
        segments=full(side.model.n_layers),
        coeffs=(1.0,),
        model=side.model,
        layout=NO_PROMPT,
        positions="completion",
    )
    return Plan((step,))
