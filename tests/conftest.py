"""Models small enough to be exact about: a tiny random Llama made here, Atlas, and stories260k."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fusion_lens import replies
from fusion_lens.activations import record
from fusion_lens.decoding import GenerationConfig
from fusion_lens.deltas import Deltas, make_deltas
from fusion_lens.generation import generate
from fusion_lens.models import HookedModel, load_model
from fusion_lens.plans import Plan, make_plan
from fusion_lens.prompts import Prompt, question_prompt, reference_prompt

# `python -m pytest` puts the checkout on the path, where an egg-info hides that it is installed:
# inspect-ai would then not know whose its tasks are
_ROOT = Path(__file__).parents[1]
if any(_ROOT.glob("*.egg-info")):
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != _ROOT]

torch.set_num_threads(1)

LLAMA = LlamaConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
TEXTS = [
    "Question: Who wrote the red book?\nAnswer and explanation:\nAda Lovelace\nIt was in 1843.",
    "Question: When was Tom born?\nAnswer: 3 May 1901\nExplanation: Tom was born on 3 May 1901.",
    "The quick brown fox jumps over the lazy dog; the harbour is quiet in winter.",
]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of test data that is not part of the repository."""
    folder = os.environ.get("FUSION_LENS_TEST_DATA")
    if not folder:
        pytest.skip("FUSION_LENS_TEST_DATA names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def stories_folder(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260k"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers with a tokenizer of its own, as a checkpoint on disk."""
    return _checkpoint(tmp_path_factory.mktemp("tiny"), 0, LlamaForCausalLM, LLAMA)


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> HookedModel:
    return load_model(tiny_folder)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture and tokenizer with other weights."""
    return _checkpoint(tmp_path_factory.mktemp("other"), 1, LlamaForCausalLM, LLAMA)


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2, which has positions for every token, on disk."""
    config = GPT2Config(
        vocab_size=320, n_positions=1024, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    return _checkpoint(tmp_path_factory.mktemp("gpt2"), 3, GPT2LMHeadModel, config)


@pytest.fixture(scope="session")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Gemma-2, with its soft caps and sliding windows, on disk."""
    config = Gemma2Config(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _checkpoint(tmp_path_factory.mktemp("gemma"), 4, Gemma2ForCausalLM, config)


@pytest.fixture(scope="session")
def hooked_transformer(tiny_folder: Path) -> HookedModel:
    """The tiny model as an unprocessed `HookedTransformer` with the same weights."""
    return make_hooked_transformer(tiny_folder)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every call of `generate` for a harness, which does its work."""
    seen: list[int] = []

    def counted(model: HookedModel, rows: Any, config: GenerationConfig) -> Any:
        seen.append(len(rows))
        return generate(model, rows, config)

    monkeypatch.setattr(replies, "generate", counted)
    return seen


@pytest.fixture
def float64(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> HookedModel:
    """The tiny model in float64, without the two upcasts to float32 that eager attention hides.

    Softmax and RMSNorm of Hugging Face's Llama compute in float32 whatever the dtype; float64
    separates bugs from rounding only without them.
    """
    softmax = torch.nn.functional.softmax

    def exact_softmax(input: torch.Tensor, dim: int = -1, dtype: object = None) -> torch.Tensor:
        kept = None if input.dtype == torch.float64 else dtype
        return softmax(input, dim=dim, dtype=kept)

    def exact_norm(self: LlamaRMSNorm, hidden: torch.Tensor) -> torch.Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(torch.nn.functional, "softmax", exact_softmax)
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    return load_model(tiny_folder, dtype="float64")


@pytest.fixture(scope="session")
def atlas() -> HookedModel:
    return load_model()


@pytest.fixture(scope="session")
def other_atlas() -> HookedModel:
    """Atlas with other weights, as after further training."""
    model = load_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 1.01
    return model


@pytest.fixture
def untouched() -> Iterator[Callable[[HookedModel], None]]:
    """Call it with a model: at the end its weights are bit-identical, and no hook is left."""
    watched: list[tuple[HookedModel, list[torch.Tensor]]] = []

    def watch(model: HookedModel) -> None:
        watched.append((model, [p.detach().clone() for p in model.parameters()]))

    yield watch
    for model, before in watched:
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert n_hooks(model) == 0


def n_hooks(model: HookedModel) -> int:
    # a hook point may stand under several names
    points = {id(point): point for point in model.hook_dict.values()}.values()
    return sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in points)


def deltas_of(model: HookedModel, question: str = "Who wrote the red book?") -> Deltas:
    reference = reference_prompt(model, question, "Ada Lovelace", "She wrote it in 1843.")
    base = question_prompt(model, question)
    return make_deltas(*record(model, [reference, base]))


def strong_plan(model: HookedModel, scale: float = 1.0, **options: object) -> Plan:
    """A plan that is sure to move logits: the deltas of a random model are small."""
    made = make_plan(deltas_of(model), (1.0, -2.0, 1.5), **options)  # type: ignore[arg-type]
    return made * (4.0 * scale)


def prompts_of(model: HookedModel) -> list[Prompt]:
    """Three prompts of different lengths."""
    return [
        question_prompt(model, question)
        for question in ("Who wrote the red book?", "When?", "When was Tom born in the harbour?")
    ]


def make_hooked_transformer(folder: Path) -> HookedModel:
    if version("transformer-lens") >= "4":
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(folder)
    config = source.config
    cfg = HookedTransformerConfig(
        n_layers=config.num_hidden_layers,
        d_model=config.hidden_size,
        d_head=config.hidden_size // config.num_attention_heads,
        n_heads=config.num_attention_heads,
        n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size,
        n_ctx=config.max_position_embeddings,
        d_vocab=config.vocab_size,
        eps=config.rms_norm_eps,
        act_fn="silu",
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_dim=config.hidden_size // config.num_attention_heads,
        rotary_adjacent_pairs=False,
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        model_name="tiny",
        device="cpu",
    )
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        convert_llama_weights(source, cfg),
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )
    return model


def _checkpoint(folder: Path, seed: int, kind: type[PreTrainedModel], config: Any) -> Path:
    """A random model of the seed with the tiny tokenizer, on disk."""
    _tiny_tokenizer().save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        kind(config).save_pretrained(folder)
    return folder


def _tiny_tokenizer() -> FastTokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return FastTokenizer(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
