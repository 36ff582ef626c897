"""Train an SAE for every layer of Atlas with sae-lens' own trainer.

    python -m fusion_lens.atlas.train_saes --out dictionaries

BatchTopK (Bussmann et al. 2024, arXiv 2412.06410) on the residual stream after each block: the
`k * batch` largest codes of a batch stay, so that a token may take more than another. Saved as the
JumpReLU SAE that sae-lens makes of it, whose threshold is the running mean of the smallest code
that stayed; the two matrices in float16, the vectors in float32. Activations are scaled to a mean
norm of sqrt(d_model) while training, and the scale is folded into the weights.

A layer's folder is written when it is done, and a layer that has one is skipped: run again to go on
after an interruption. A layer depends on the seed and not on the layers before it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion_lens.atlas import CHECKPOINT, DICTIONARIES
from fusion_lens.atlas.decoding import load_completer
from fusion_lens.atlas.dictionary_activations import (
    record_tokens,
    shuffled_batches,
    tokenize_documents,
)
from fusion_lens.atlas.dictionary_cards import sae_name, save_card
from fusion_lens.atlas.dictionary_text import draw_side_documents, make_side
from fusion_lens.atlas.world import WORLD_SEED, make_world
from fusion_lens.errors import ConfigError, MissingExtraError
from fusion_lens.identity import ModelIdentity, identify
from fusion_lens.models import HookedModel, load_model, resid_post
from fusion_lens.sae_files import WEIGHTS, seal_sae

MATRICES = ("W_enc", "W_dec")


@dataclass(frozen=True, slots=True)
class SaeConfig:
    """Everything that decides the weights, except the machine. `k` is the mean number of codes a
    token, `dead_after` the steps without firing after which a feature counts as dead."""

    d_sae: int = 768
    k: float = 15.4
    n_documents: int = 20_000
    n_samples: int = 3_500_000
    batch_size: int = 2048
    learning_rate: float = 6e-3
    warmup_steps: int = 200
    decay_share: float = 0.3
    dead_after: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.k <= self.d_sae:
            raise ConfigError(f"0 < k <= d_sae must hold, but got {self.k=}, {self.d_sae=}.")
        if not 0 < self.batch_size <= self.n_samples:
            raise ConfigError(
                "0 < batch_size <= n_samples must hold, "
                f"but got {self.batch_size=}, {self.n_samples=}."
            )


def train_sae(
    config: SaeConfig, resid: Float[Tensor, "token d_model"], metadata: dict[str, Any]
) -> Any:
    """sae-lens' training SAE after its training on `resid`; random generators stay as they were.

    Raises:
        MissingExtraError: if sae-lens is not installed.
    """
    try:
        from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.saes.sae import SAEMetadata
        from sae_lens.training.sae_trainer import SAETrainer
    except ImportError as error:
        raise MissingExtraError("sae-lens", "sae") from error
    steps = config.n_samples // config.batch_size
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        sae = BatchTopKTrainingSAE(
            BatchTopKTrainingSAEConfig(
                d_in=resid.shape[-1],
                d_sae=config.d_sae,
                k=config.k,
                normalize_activations="expected_average_only_in",
                metadata=SAEMetadata(**metadata),
            )
        )
        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=steps * config.batch_size,
                train_batch_size_samples=config.batch_size,
                lr=config.learning_rate,
                lr_end=config.learning_rate,
                lr_warm_up_steps=min(config.warmup_steps, steps // 4),
                lr_decay_steps=int(config.decay_share * steps),
                dead_feature_window=config.dead_after,
                n_batches_for_norm_estimate=50,
            ),
            sae,
            shuffled_batches(resid, config.batch_size, seed=config.seed),
        )
        return trainer.fit()


def save_sae(sae: Any, folder: Path, model: ModelIdentity) -> None:
    """Write sae-lens' inference folder, its two matrices in float16, and seal it."""
    sae.save_inference_model(folder)
    path = folder / WEIGHTS
    tensors = load_file(path)
    save_file({name: _stored(name, tensor) for name, tensor in tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes files that only their owner can read
    seal_sae(folder, model)


def sae_metadata(model: HookedModel, layer: int) -> dict[str, Any]:
    """What sae-lens' config says beside the numbers: of which model, trained on which tokens."""
    identity = identify(model)
    return {
        "hook_name": resid_post(layer),
        "model_name": identity.name,
        "prepend_bos": True,
        "exclude_special_tokens": True,
        "context_size": int(model.cfg.n_ctx),
        "dataset_path": "fusion_lens.atlas.dictionary_text",
        "model_processing": identity.processing,
    }


def record_training_text(
    model: HookedModel, n_documents: int, seed: int
) -> Float[Tensor, "layer token d_model"]:
    """Residuals of `n_documents` of the training side, in float16."""
    documents = draw_side_documents(
        make_side(make_world(WORLD_SEED), "train"),
        n_documents,
        seed=seed,
        complete=load_completer(CHECKPOINT),
    )
    return record_tokens(model, tokenize_documents(model, documents), dtype=torch.float16).resid


def _stored(name: str, tensor: Tensor) -> Tensor:
    return tensor.to(torch.float16 if name in MATRICES else torch.float32).contiguous()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the SAEs of some or all layers."""
    parser = argparse.ArgumentParser(prog="python -m fusion_lens.atlas.train_saes")
    parser.add_argument("--out", type=Path, default=DICTIONARIES)
    parser.add_argument("--layers", type=int, nargs="*", help="all of them if left out")
    for field in fields(SaeConfig):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    out, layers = options.pop("out"), options.pop("layers")
    config = SaeConfig(**options)
    model = load_model()
    layers = layers or range(int(model.cfg.n_layers))
    left = [layer for layer in layers if not (out / sae_name(layer) / "card.json").exists()]
    if not left:
        return
    resid = record_training_text(model, config.n_documents, config.seed)
    print(f"{resid.shape[1]} tokens of {config.n_documents} documents", flush=True)
    for layer in left:
        sae = train_sae(config, resid[layer], sae_metadata(model, layer))
        save_sae(sae, out / sae_name(layer), identify(model))
        save_card(
            out / sae_name(layer),
            {
                "model": asdict(identify(model)),
                "hook_names": [resid_post(layer)],
                "recipe": {"trainer": "sae-lens BatchTopK", **asdict(config)},
                "training_tokens": int(resid.shape[1]),
                "versions": {name: version(name) for name in ("sae-lens", "torch")},
            },
        )
        print(f"{sae_name(layer)} done", flush=True)


if __name__ == "__main__":
    main()
