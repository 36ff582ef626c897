"""What the tests of the engine share: tiny checkpoints of other families, rows, and references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from conftest import _tiny_tokenizer, prompts_of
from torch import Tensor

from fusion_lens.decoding import Completion, GenerationConfig, Row
from fusion_lens.engine_log import EngineLog
from fusion_lens.generation import generate
from fusion_lens.hooks import fwd_hooks
from fusion_lens.models import HookedModel, load_model
from fusion_lens.plans import Plan
from fusion_lens.prompts import Prompt, tokenize

_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    **_IDS,
}
_GROUPS = {**_SIZES, "num_key_value_heads": 2}
_GPT2_SIZES = {
    "vocab_size": 320,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    **_IDS,
}
_GEMMA3 = {
    **_GROUPS,
    "head_dim": 12,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", _GPT2_SIZES),
    "gpt2_short": ("GPT2Config", {**_GPT2_SIZES, "n_positions": 126}),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "gptj": ("GPTJConfig", {**_GPT2_SIZES, "rotary_dim": 8}),
    "opt": (
        "OPTConfig",
        {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 48, "init_std": 0.2},
    ),
    "llama": ("LlamaConfig", {**_GROUPS, "attention_bias": True, "mlp_bias": True}),
    "llama_tied": ("LlamaConfig", {**_GROUPS, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_GROUPS, "head_dim": 12, "sliding_window": 4}),
    "mixtral": ("MixtralConfig", {**_GROUPS, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", _GROUPS),
    "qwen2_windows": (
        "Qwen2Config",
        {**_GROUPS, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3Config", {**_GROUPS, "head_dim": 12}),
    "gemma2": ("Gemma2Config", {**_GROUPS, **_CAPS, "head_dim": 12, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", _GEMMA3),
    "gemma3_images": (
        "Gemma3Config",
        {
            "text_config": _GEMMA3,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": 310,
            "eoi_token_index": 311,
            "image_token_index": 312,
            **_IDS,
        },
    ),
    "phi3": ("Phi3Config", _GROUPS),
    "olmo": ("OlmoConfig", _GROUPS),
    "phi": ("PhiConfig", _SIZES),
    "gpt_neo": (
        "GPTNeoConfig",
        {
            **{name: value for name, value in _SIZES.items() if not name.startswith("num_")},
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 12,
        },
    ),
    "llama4": (
        "Llama4TextConfig",
        {
            **_GROUPS,
            "head_dim": 12,
            "intermediate_size_mlp": 64,
            "num_local_experts": 2,
            "attention_chunk_size": 10,
        },
    ),
    "phi3_long": (
        "Phi3Config",
        {
            **_GROUPS,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 6,
                "long_factor": [4.0] * 6,
                "original_max_position_embeddings": 24,
            },
        },
    ),
}
"""Config class and settings of every family; sizes are tiny, windows shorter than the prompts."""


def family_module(name: str) -> Any:
    """The random Hugging Face module of a family. No parameter is a constant: biases and norms
    count."""
    kind, settings = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, kind)(**settings), attn_implementation="eager"
        )
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module.train(False)


def save_family(name: str, folder: Path) -> Path:
    """A random checkpoint of a family, with the tokenizer of the tests."""
    transformers.logging.disable_progress_bar()
    family_module(name).save_pretrained(folder)
    _tiny_tokenizer().save_pretrained(folder)
    return folder


@cache
def family(name: str, dtype: str = "float32") -> HookedModel:
    """The bridge of a family, to be left as it is."""
    with TemporaryDirectory() as folder:
        return load_model(save_family(name, Path(folder)), dtype=dtype)


def hand_prompt(tokens: Sequence[int], special: Sequence[int] = (0,)) -> Prompt:
    """A prompt of just these tokens."""
    return Prompt(
        text="", tokens=tuple(tokens), str_tokens=tuple(map(str, tokens)), special=tuple(special)
    )


def all_prompts(model: HookedModel) -> list[Prompt]:
    """Prompts of many lengths: usual ones, single tokens, and one that ends in a special token."""
    return [
        *prompts_of(model)[:2],
        hand_prompt((1,)),
        hand_prompt((77,), special=()),
        hand_prompt((1, 60, 61, 62, 2), special=(0, 4)),
        hand_prompt((1, *range(40, 60)), special=(0, 7, 20)),
    ]


def mixed_rows(model: HookedModel, plan: Plan, number: int) -> list[Row]:
    """Rows whose lengths and scales vary, unsteered ones among them."""
    scales = (1.0, None, -0.5, 0.3)
    rows = []
    for i in range(number):
        scale = scales[i % 4]
        text = "When " + "did Tom " * (i * 5 % 7) + "go" * (i % 3)
        rows.append(Row(tokenize(model, text), None if scale is None else plan * scale, seed=i))
    return rows


def written(
    model: HookedModel, rows: Sequence[Row], log: EngineLog | None = None, **options: Any
) -> list[Completion]:
    """`generate` with every step's logits kept; four tokens, whatever comes."""
    config = GenerationConfig(max_new_tokens=4, stop_at_eos=False, keep_logits=True)
    return generate(model, rows, replace(config, **options), log=log)


def logits_of(completion: Completion) -> Tensor:
    """The kept logits, "step d_vocab"."""
    assert completion.logits is not None
    return completion.logits


def largest_gap(some: Sequence[Completion], others: Sequence[Completion]) -> float:
    """The largest difference between the logits of two runs of the same rows."""
    gaps = [
        (logits_of(one) - logits_of(other)).abs().max()
        for one, other in zip(some, others, strict=True)
    ]
    return float(torch.stack(gaps).max())


def same_bits(one: Completion, other: Completion) -> bool:
    """Whether tokens and all logits are equal to the last bit."""
    return one == other and torch.equal(logits_of(one), logits_of(other))


def slow_logits(model: Any, row: Row, completion: Completion) -> Tensor:
    """The logits of a completion from TransformerLens' own passes: one row, no padding, no cache.

    A shift that is constant allows one pass for all steps; a running mean needs one for each.
    """
    written_so_far = [completion.tokens[:step] for step in range(len(completion.tokens))]
    passes = written_so_far if row.needs_sequence else written_so_far[-1:]
    hooks = [] if row.plan is None else fwd_hooks(row.plan, prompt=row.prompt, offset=0)
    seen = []
    for tokens in passes:
        with torch.no_grad():
            logits = model.run_with_hooks(
                torch.tensor([row.prompt.tokens + tokens]), fwd_hooks=hooks
            )[0]
        seen.append(logits[-1:] if row.needs_sequence else logits[len(row.prompt.tokens) - 1 :])
    return torch.cat(seen)


def raising_above(
    forward: Callable[..., Tensor], most_rows: int, error: Exception, seen: list[int]
) -> Callable[..., Tensor]:
    """`forward`, but a batch of more than `most_rows` rows raises; `seen` gets every batch size."""

    def limited(self: Any, tokens: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(len(tokens))
        if len(tokens) > most_rows:
            raise error
        return forward(self, tokens, *args, **options)

    return limited
