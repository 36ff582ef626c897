"""Tiny tokenizers that differ as those of published families do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from conftest import TEXTS
from engine import save_family
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast as FastTokenizer

from fusion_lens.models import HookedModel, load_model

END = "<|endoftext|>"


def byte_level(
    special: list[str], texts: list[str] = TEXTS, *, across_words: bool = False
) -> Tokenizer:
    """BPE over bytes; with `across_words` nothing is split before merges, so that a token may hold
    several words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=not across_words
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return backend


def one_special() -> FastTokenizer:
    """GPT-2's and GPT-NeoX's: one special token, which is BOS, EOS and unknown; no padding, and
    none is added."""
    return FastTokenizer(
        tokenizer_object=byte_level([END]), bos_token=END, eos_token=END, unk_token=END
    )


def no_bos() -> FastTokenizer:
    """Qwen's: no BOS at all, the end of a text pads."""
    special = [END, "<|im_start|>", "<|im_end|>"]
    return FastTokenizer(
        tokenizer_object=byte_level(special), eos_token="<|im_end|>", pad_token=END
    )


def no_padding() -> FastTokenizer:
    """Llama's and Mistral's: words begin with a mark, BOS is added, nothing pads."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    backend.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return FastTokenizer(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def across_words() -> FastTokenizer:
    """Tokens of several words: the end of a question and the beginning of its answer are one."""
    texts = [*[":\nAda"] * 9, *[" Lovelace", "1843."] * 3]
    backend = byte_level(["<pad>", "<s>", "</s>"], texts, across_words=True)
    return FastTokenizer(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def opened_with(name: str, tokenizer: Callable[[], FastTokenizer], folder: Path) -> HookedModel:
    """A family's random checkpoint with a tokenizer, from disk."""
    save_family(name, folder)
    for old in folder.glob("*token*"):
        old.unlink()
    tokenizer().save_pretrained(folder)
    return load_model(folder)
