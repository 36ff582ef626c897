"""A dictionary whose codes can be told by looking."""

import torch

from fusion_lens.dictionaries import Card
from fusion_lens.models import resid_post
from fusion_lens.sae_files import FileSAE


def identity_sae(d_model, layer=0):
    """Positive and negative parts of every unit: nothing is lost."""
    both = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    return FileSAE(
        Card("identity", (layer,), (resid_post(layer),), d_model, 2 * d_model),
        W_enc=both.T,
        b_enc=torch.zeros(2 * d_model),
        W_dec=both,
        b_dec=torch.zeros(d_model),
    )
