"""Train one crosscoder over the residual stream after all blocks of Atlas.

    python -m fusion_lens.atlas.train_crosscoder --out dictionaries

    x'[l] = (x[l] - mean[l]) * s[l],   s[l] = sqrt(d_model) / sqrt(sum_d std[l]^2)
    a = relu(sum_l W_enc[l]^T x'[l] + b_enc),   n_i = sum_l ||W_dec[l, i]||
    f_i = a_i where a_i n_i is among the k * batch largest of the batch, else 0 (BatchTopK)
    x_hat'[l] = W_dec[l]^T f + b_dec[l]

The loss is the squared error of x', in which every layer has the same variance, plus that of dead
features on what the live ones leave (Gao et al. 2024, arXiv 2406.04093). After training, the
threshold is the value that k codes a token exceed on training text; at inference f_i = a_i where
a_i n_i > threshold (Bussmann et al. 2024, arXiv 2412.06410).

Written by `save_crosscoder`, the matrices in float16, which the threshold is found with. A run
takes a quarter of an hour and is not resumed.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from math import sqrt
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from fusion_lens.atlas import DICTIONARIES
from fusion_lens.atlas.crosscoder_weights import (
    STORED,
    Weights,
    code_norms,
    init_weights,
    to_crosscoder,
)
from fusion_lens.atlas.dictionary_activations import shuffled_batches, token_chunks
from fusion_lens.atlas.dictionary_cards import CROSSCODER, save_card
from fusion_lens.atlas.train_saes import record_training_text
from fusion_lens.crosscoder_files import save_crosscoder
from fusion_lens.crosscoders import Crosscoder, Normaliser, make_normaliser
from fusion_lens.dictionaries import Card
from fusion_lens.errors import ConfigError
from fusion_lens.identity import identify
from fusion_lens.models import HookedModel, load_model, resid_post

_THRESHOLD_TOKENS = 65_536


@dataclass(frozen=True, slots=True)
class CrosscoderConfig:
    """Everything that decides the weights, except the machine. `k` is the mean number of codes a
    token, `dead_after` the steps without firing after which a feature counts as dead."""

    d_sae: int = 832
    k: int = 30
    n_documents: int = 20_000
    n_samples: int = 3_000_000
    batch_size: int = 2048
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    decay_share: float = 0.3
    dead_after: int = 100
    k_aux: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(f"0 < k <= d_sae must hold, but got {self.k=}, {self.d_sae=}.")
        if not 0 < self.batch_size <= self.n_samples:
            raise ConfigError(
                "0 < batch_size <= n_samples must hold, "
                f"but got {self.batch_size=}, {self.n_samples=}."
            )


def fit_normaliser(resid: Float[Tensor, "layer token d_model"]) -> Normaliser:
    """Mean and standard deviation of every unit of every layer."""
    mean = torch.stack([layer.float().mean(dim=0) for layer in resid])
    std = torch.stack([layer.float().std(dim=0) for layer in resid])
    return make_normaliser(mean, std, target_rms=sqrt(resid.shape[-1]))


def train_crosscoder(
    config: CrosscoderConfig, resid: Float[Tensor, "layer token d_model"], normaliser: Normaliser
) -> Weights:
    """Train on `resid`; prints the share of variance explained now and then."""
    n_layers, _, d_model = resid.shape
    weights = init_weights(n_layers, d_model, config.d_sae, config.seed)
    optimizer = torch.optim.Adam(weights.trained, lr=config.learning_rate)
    steps = config.n_samples // config.batch_size
    silent = torch.zeros(config.d_sae, dtype=torch.long)
    batches = shuffled_batches(resid, config.batch_size, seed=config.seed)
    for step in range(steps):
        x = normaliser.normalise(next(batches)).flatten(1)
        loss, explained, fired = _loss(config, weights, x, silent > config.dead_after, n_layers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _rate(config, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        silent = torch.where(fired, 0, silent + 1)
        if step % 100 == 0 or step + 1 == steps:
            dead = int((silent > config.dead_after).sum())
            print(f"step {step} of {steps}  explained {explained:.4f}  dead {dead}", flush=True)
    for tensor in weights.trained:
        tensor.requires_grad_(False)
    return weights


def with_threshold(
    crosscoder: Crosscoder, resid: Float[Tensor, "layer token d_model"], k: int
) -> Crosscoder:
    """The crosscoder with the threshold that `k` normalised codes a token exceed, over `resid`."""
    norms = crosscoder.code_norms
    flat = torch.cat(
        [
            (crosscoder.encode(chunk).codes * norms).flatten()
            for chunk in token_chunks(resid, crosscoder.card.layers)
        ]
    )
    place = flat.numel() - k * resid.shape[1]
    return replace(crosscoder, threshold=float(flat.kthvalue(place).values), k=k)


def crosscoder_card(model: HookedModel, d_sae: int) -> Card:
    """What the crosscoder's file says beside the numbers."""
    identity = identify(model)
    layers = tuple(range(identity.n_layers))
    return Card(
        name=CROSSCODER,
        layers=layers,
        hook_names=tuple(resid_post(layer) for layer in layers),
        d_model=identity.d_model,
        d_sae=d_sae,
        model_name=identity.name,
        prepend_bos=True,
        trained_on_bos=False,
        weights=identity.weights,
        embedding=identity.embedding,
    )


def _loss(
    config: CrosscoderConfig,
    weights: Weights,
    x: Float[Tensor, "batch width"],
    dead: Bool[Tensor, " d_sae"],
    n_layers: int,
) -> tuple[Float[Tensor, ""], float, Bool[Tensor, " d_sae"]]:
    """The loss, the share of variance explained, and which features fired."""
    active = (x @ weights.encoder + weights.encoder_bias).relu()
    normed = active * code_norms(weights.decoder, n_layers)
    kept = normed.detach().flatten().topk(config.k * len(x), sorted=False).indices
    mask = torch.zeros(normed.numel()).index_fill_(0, kept, 1.0).view_as(normed)
    codes = active * mask
    error = x - codes @ weights.decoder - weights.decoder_bias
    loss = error.pow(2).sum(dim=-1).mean()
    explained = 1 - float(loss.detach()) / float((x - x.mean(dim=0)).pow(2).sum(dim=-1).mean())
    if dead.any():
        places = dead.nonzero()[:, 0]
        k_aux = min(config.k_aux, len(places))
        top = (normed[:, places]).topk(k_aux, dim=-1, sorted=False).indices
        chosen = torch.zeros(len(x), len(places)).scatter_(1, top, 1.0)
        aux = (active[:, places] * chosen) @ weights.decoder[places]
        loss = loss + k_aux / config.k_aux * (error.detach() - aux).pow(2).sum(dim=-1).mean()
    return loss, explained, (codes.detach() > 0).any(dim=0)


def _rate(config: CrosscoderConfig, step: int, steps: int) -> float:
    """Linear warm-up, a plateau, and a linear way down to 0."""
    warmup = min(config.warmup_steps, steps // 4)
    return min(1.0, (step + 1) / max(1, warmup), (steps - step) / (config.decay_share * steps))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the crosscoder."""
    parser = argparse.ArgumentParser(prog="python -m fusion_lens.atlas.train_crosscoder")
    parser.add_argument("--out", type=Path, default=DICTIONARIES)
    for field in fields(CrosscoderConfig):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    folder = options.pop("out") / CROSSCODER
    config = CrosscoderConfig(**options)
    model = load_model()
    resid = record_training_text(model, config.n_documents, config.seed)
    n_tokens = resid.shape[1]
    print(f"{n_tokens} tokens of {config.n_documents} documents", flush=True)
    normaliser = fit_normaliser(resid)
    weights = train_crosscoder(config, resid, normaliser)
    card = crosscoder_card(model, config.d_sae)
    crosscoder = to_crosscoder(weights, normaliser, card)
    crosscoder = with_threshold(crosscoder, resid[:, -_THRESHOLD_TOKENS:], config.k)
    save_crosscoder(crosscoder, folder, dtype=STORED)
    save_card(
        folder,
        {
            "model": asdict(identify(model)),
            "hook_names": list(card.hook_names),
            "recipe": {"trainer": "BatchTopK crosscoder", **asdict(config)},
            "training_tokens": n_tokens,
            "versions": {"torch": version("torch")},
        },
    )


if __name__ == "__main__":
    main()
