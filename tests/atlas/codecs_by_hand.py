"""Dictionaries whose codes can be told by looking."""

import torch

from fusion_lens.atlas.dictionary_codec import Codec


def identity_codec(d_model, layers=(0,)):
    """Positive and negative parts of every unit of one layer: nothing is lost."""
    both = torch.cat([torch.eye(d_model), -torch.eye(d_model)])
    return Codec(
        layers=layers,
        encoder=both.T[None],
        encoder_bias=torch.zeros(2 * d_model),
        decoder=both[None],
        decoder_bias=torch.zeros(1, d_model),
        threshold=torch.zeros(2 * d_model),
        gate=torch.ones(2 * d_model),
        mean=torch.zeros(1, d_model),
        scale=torch.ones(1),
    )
