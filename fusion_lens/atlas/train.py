"""Train Atlas from scratch: tokenizer, model, log and half-precision checkpoint.

    python -m fusion_lens.atlas.train --out atlas

A step draws its documents from (seed, step) and its learning rate from the step, and the state
(weights, optimiser moments, step) is kept in a safetensors file, so that a run that was interrupted
and started again ends with the weights of one that was not, on the same machine.
Matrices inside the blocks are trained with Muon (Jordan et al. 2024), the embedding and the norms
with AdamW; warm-up, then a cosine to a tenth of the peak. Muon needs torch 2.9 or later.

Where other work shares the processor, OMP_WAIT_POLICY=PASSIVE keeps a step from taking many times
as long.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from math import cos, pi
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fusion_lens.atlas.batches import Batch, make_batches
from fusion_lens.atlas.corpus import draw_documents
from fusion_lens.atlas.decoding import make_completer
from fusion_lens.atlas.probes import run_probes
from fusion_lens.atlas.tokenizer import train_tokenizer
from fusion_lens.atlas.training_log import TrainingLog
from fusion_lens.atlas.training_state import load_state, save_state
from fusion_lens.atlas.world import WORLD_SEED, World, make_world
from fusion_lens.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """Everything that decides the weights, except the machine."""

    steps: int = 1000
    documents_per_step: int = 96
    batches_per_step: int = 6
    seed: int = 0
    d_vocab: int = 1536
    d_model: int = 192
    d_mlp: int = 512
    n_layers: int = 6
    n_heads: int = 6
    learning_rate: float = 3e-3
    warmup_steps: int = 60
    weight_decay: float = 0.01
    save_every: int = 125
    probe_n: int = 60

    def __post_init__(self) -> None:
        if not 0 < self.warmup_steps < self.steps:
            raise ConfigError(
                f"0 < warmup_steps < steps must hold, but got {self.warmup_steps=}, {self.steps=}."
            )


def train(config: TrainingConfig, out: Path, *, device: str, stop_at: int | None = None) -> None:
    """Train into `out`, going on from the state found there.

    Leaves `training_log.jsonl`, the state and, once all steps are done, `checkpoint/`. With
    `stop_at` the run ends early, as an interrupted one does.
    """
    world = make_world(WORLD_SEED)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _open_tokenizer(config, world, out)
    model = make_model(config, tokenizer).to(device)
    optimizers = make_optimizers(config, model)
    state = out / "state.safetensors"
    first = load_state(state, model, optimizers, config=asdict(config))
    log = TrainingLog(out / "training_log.jsonl", first)
    last = config.steps if stop_at is None else min(stop_at, config.steps)
    for step in range(first, last):
        documents = draw_documents(
            world, seed=config.seed, step=step, count=config.documents_per_step
        )
        batches = make_batches(documents, tokenizer, n_batches=config.batches_per_step)
        loss = _train_step(model, optimizers, batches, learning_rate(config, step))
        log.add(loss, sum(batch.n_tokens for batch in batches))
        if (step + 1) % config.save_every == 0 or step + 1 == last:
            log.write(_probe(config, world, model, tokenizer))
            save_state(state, model, optimizers, step=step + 1, config=asdict(config))
    if last == config.steps:
        save_checkpoint(model, tokenizer, out / "checkpoint")


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine that ends at a tenth of it."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * (0.1 + 0.9 * (1 + cos(pi * done)) / 2)


def make_model(config: TrainingConfig, tokenizer: Any) -> LlamaForCausalLM:
    """A model with weights drawn from the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=config.d_model,
                intermediate_size=config.d_mlp,
                num_hidden_layers=config.n_layers,
                num_attention_heads=config.n_heads,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )


def make_optimizers(
    config: TrainingConfig, model: LlamaForCausalLM
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    parameters = list(model.named_parameters())
    inner = [p for name, p in parameters if p.ndim == 2 and "embed" not in name]
    outer = [p for name, p in parameters if p.ndim != 2 or "embed" in name]
    return (
        torch.optim.Muon(
            inner,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            outer, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
        ),
    )


def save_checkpoint(model: LlamaForCausalLM, tokenizer: Any, folder: Path) -> None:
    """Write an ordinary Hugging Face folder, the weights in float16; the model stays as it was."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    kept = json.loads(settings.read_text(encoding="utf-8"))
    for where_it_was_opened in ("is_local", "local_files_only"):
        kept.pop(where_it_was_opened, None)
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name every version of 4 and 5 knows
    settings.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def _train_step(
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[Batch],
    rate: float,
) -> float:
    """One update of every weight; gives the mean loss per unit of weight before it."""
    total = sum(float(batch.weights.sum()) for batch in batches)
    loss_sum = 0.0
    for batch in batches:
        loss = _weighted_loss(model, batch) / total
        loss.backward()
        loss_sum += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return loss_sum


def _weighted_loss(model: LlamaForCausalLM, batch: Batch) -> Float[Tensor, ""]:
    """Sum over tokens of weight * cross-entropy; right padding needs no mask under causality."""
    tokens = batch.tokens.to(model.device)
    weights = batch.weights.to(model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum()


def _probe(
    config: TrainingConfig, world: World, model: LlamaForCausalLM, tokenizer: Any
) -> dict[str, float]:
    if config.probe_n == 0:
        return {}
    model.eval()
    shares = run_probes(
        world,
        make_completer(model, tokenizer),
        make_completer(model, tokenizer, sample_seed=config.seed),
        n=config.probe_n,
        seed=1,
    )
    model.train()
    return {name: round(share.value, 4) for name, share in shares.items()}


def _open_tokenizer(config: TrainingConfig, world: World, out: Path) -> Any:
    """The tokenizer of an earlier start, or one trained on documents of negative steps."""
    folder = out / "tokenizer"
    if not folder.exists():
        steps = range(-200, 0)
        texts = (
            document.text
            for step in steps
            for document in draw_documents(world, seed=config.seed, step=step, count=100)
        )
        train_tokenizer(texts, d_vocab=config.d_vocab).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from the command line; run again to go on after an interruption."""
    parser = argparse.ArgumentParser(prog="python -m fusion_lens.atlas.train")
    parser.add_argument("--out", type=Path, default=Path("atlas"), help="folder of the run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    for field in fields(TrainingConfig):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(field.default), default=field.default)
    options = vars(parser.parse_args(arguments))
    out, device = options.pop("out"), options.pop("device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    train(TrainingConfig(**options), out, device=device)


if __name__ == "__main__":
    main()
