"""A checkpoint -> Hugging Face's module whose matrices are in 8 or 4 bits, by bitsandbytes.

8 bits is LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339): the rows of a matrix are int8 times a
scale, and so are those of what it is multiplied with, but for the columns in which some row of the
pass reaches 6, which stay in float16. 4 bits is NF4 (Dettmers et al. 2023, arXiv 2305.14314):
blocks of 64 weights are one of 16 levels times a scale, and products are of the `dtype`. Embedding,
unembedding, norms and biases stay as they are, and so does a matrix that TransformerLens takes
apart: queries, keys and values, or gate and input of an MLP, in one.

Knows nothing of hook points.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from fusion_lens.errors import MissingExtraError

DTYPES = {8: "float16", 4: "bfloat16"}
"""Of what is not quantised, by bits, where none is asked for: LLM.int8 multiplies in float16."""

_TAKEN_APART = ("c_attn", "query_key_value", "qkv_proj", "gate_up_proj")


def load_quantised(
    source: str, *, bits: int, revision: str | None, device_map: Any, dtype: torch.dtype
) -> Any:
    """Hugging Face's causal language model with its matrices in `bits` bits, on a CPU too.

    Raises:
        MissingExtraError: if bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise MissingExtraError("bitsandbytes", "bitsandbytes")

    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"load_in_8bit": True}
    if bits == 4:
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": dtype,
        }
    module = AutoModelForCausalLM.from_pretrained(
        source,
        revision=revision,
        dtype=dtype,
        quantization_config=BitsAndBytesConfig(
            llm_int8_skip_modules=_kept(source, revision), **options
        ),
        device_map=device_map,
        trust_remote_code=False,
    )
    for part in module.modules():
        if hasattr(part, "support_avx512bf16_for_cpu"):
            # else the first pass on some CPUs packs the weights anew and rounds their scales: the
            # model would be another than the one that was identified, and than on other machines
            part.support_avx512bf16_for_cpu = False
    return module


def _kept(source: str, revision: str | None) -> list[str] | None:
    """The modules to leave as they are; None: transformers' own choice."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert

    config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    taken = {name.rpartition(".")[2] for name, _ in bare.named_modules()} & {*_TAKEN_APART}
    # a list takes the place of transformers' own, which spares the unembedding
    return [*get_keys_to_not_convert(bare), *sorted(taken)] if taken else None
