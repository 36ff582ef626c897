"""What every method asks of the activations that it is fitted on."""

from __future__ import annotations

from fusion_lens.errors import ActivationError
from fusion_lens.site_activations import SiteActivations


def require_pairs(right: SiteActivations, wrong: SiteActivations, least: int = 2) -> None:
    """Make sure that the rows of both sides are pairs, and enough of them.

    Raises:
        ActivationError: if the sides are of different models, sites or numbers of rows, or have
            fewer than `least`.
    """
    right.check_beside(wrong)
    if len(right) != len(wrong):
        raise ActivationError(
            "both sides of every pair must be there, in one order, but got "
            f"{len(right)} right and {len(wrong)} wrong; read both of the same pairs."
        )
    if len(right) < least:
        raise ActivationError(
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
