"""What every method asks of the texts it is fitted on."""

from __future__ import annotations

from fusion_lens.errors import ActivationError, ContrastError
from fusion_lens.site_activations import SiteActivations


def require_pairs(right: SiteActivations, wrong: SiteActivations, least: int = 2) -> None:
    """Make sure that the rows of two sides are pairs, and enough of them.

    Raises:
        ActivationError: if the sides are of two models or sites.
        ContrastError: if they have unequally many rows, or fewer than `least`.
    """
    right.check_beside(wrong)
    if len(right) != len(wrong):
        raise ContrastError(
            f"every right text must have its wrong one, but got {len(right)} right "
            f"and {len(wrong)} wrong texts; record both sides of the same pairs."
        )
    if len(right) < least:
        raise ContrastError(
            f"there must be at least {least} pairs to learn from, but got {len(right)}; add some."
        )


def require_site(found: SiteActivations, site: str) -> None:
    """Make sure that activations are of the site that a method acts at.

    Raises:
        ActivationError: if they are not.
    """
    if found.site != site:
        raise ActivationError(
            f"the method must be given activations at {site}, but got {found.site}; "
            f'read them with record_at(..., site="{site}").'
        )
