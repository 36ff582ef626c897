from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import prompts_of
from engine import family, family_module

from fusion_lens.errors import UnfitModelError
from fusion_lens.executors import lean_of
from fusion_lens.lean import Lean, attention, attention_masks, share, shares
from fusion_lens.models import HookedModel, load_model


def whole_pass(lean: Lean, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """Unpadded rows from position 0, without a cache."""
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    with torch.no_grad():
        return lean.forward(
            tokens, positions, attention_masks(lean, positions, positions), **options
        )


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi3"])
def test_the_module_holds_the_bridges_very_tensors(name: str) -> None:
    model: Any = family(name)
    lean = share(model)
    # either kind: an unembedding's bias is a buffer of TransformerLens 4's bridge
    theirs = {id(t): t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    for kind in ("parameters", "buffers"):
        ours = {id(tensor): tensor.data_ptr() for tensor in getattr(lean.module, kind)()}
        assert ours.items() <= theirs.items()
    published = {name for name, _ in family_module(name).named_parameters()}
    assert published <= {name for name, _ in lean.module.named_parameters()}
    assert shares(lean, model)
    assert not shares(lean, family("llama"))


MEMORY = """
import sys, torch, transformers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from fusion_lens.executors import lean_of
from fusion_lens.generation import GenerationConfig, Row, generate
from fusion_lens.models import load_model
from fusion_lens.prompts import tokenize

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
tokenizer, folder = sys.argv[1:]
config = LlamaConfig(vocab_size=320, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
                     num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128,
                     bos_token_id=1, eos_token_id=2, pad_token_id=0)
LlamaForCausalLM(config).save_pretrained(folder)
AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
model = load_model(folder)
rows = [Row(tokenize(model, "Who wrote the red book?"))]
options = {"max_new_tokens": 4, "slots": 1, "stop_at_eos": False}
# the hook points touch every weight, and warm up all that allocates once
for _ in range(2):
    hooks = generate(model, rows, GenerationConfig(executor="hooks", **options))
before = resident()
lean_of(model)
lean = generate(model, rows, GenerationConfig(executor="lean", **options))
after = resident()
assert lean[0].tokens == hooks[0].tokens
size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
print(size, after - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the memory there")
@pytest.mark.slow
def test_the_module_takes_no_memory_of_its_own(tiny_folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, str(tiny_folder), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    size, grown = map(int, done.stdout.split())
    assert size > 90e6
    assert grown < 0.1 * size


def test_making_the_module_draws_no_random_number_and_leaves_the_original_alone(
    tiny_folder: Path,
) -> None:
    model: Any = load_model(tiny_folder)
    kept = model.original_model.config._attn_implementation
    state = torch.get_rng_state()
    share(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.original_model.config._attn_implementation == kept
    assert not any(
        hook
        for module in model.modules()
        for hook in module._forward_hooks.values()
        if getattr(hook, "__module__", "").startswith(("fusion_lens", "functools"))
    )


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "gemma3", "olmo"])
def test_its_logits_are_those_of_the_published_module(name: str) -> None:
    lean = share(family(name))
    tokens = (torch.arange(40).view(2, 20) * 7 + 3) % 320
    with torch.no_grad():
        expected = family_module(name)(tokens).logits
    assert (whole_pass(lean, tokens) - expected).abs().max() < 1e-4
    assert (whole_pass(lean, tokens, last=3) - expected[:, -3:]).abs().max() < 1e-4


def test_a_hook_behind_a_block_sees_and_changes_the_residual_stream(tiny: HookedModel) -> None:
    lean = share(tiny)
    prompt = prompts_of(tiny)[0].to_tensor()
    shift = torch.linspace(-1.0, 1.0, 32)
    seen: list[torch.Tensor] = []
    before = whole_pass(lean, prompt)
    with lean.at_blocks({1: seen.append, 2: lambda resid: resid + shift}):
        inside = whole_pass(lean, prompt)
        with lean.at_blocks({}):
            assert torch.equal(whole_pass(lean, prompt), before)
        assert torch.equal(whole_pass(lean, prompt), inside)
    assert torch.equal(whole_pass(lean, prompt), before)
    with torch.no_grad():
        _, cache = tiny.run_with_cache(prompt)  # type: ignore[attr-defined]
        hooked = tiny.run_with_hooks(  # type: ignore[attr-defined]
            prompt, fwd_hooks=[("blocks.2.hook_resid_post", lambda resid, hook: resid + shift)]
        )
    assert torch.allclose(seen[0], cache["blocks.1.hook_resid_post"], atol=1e-5)
    assert torch.allclose(inside, hooked, atol=1e-4)
    assert (inside - before).abs().max() > 0.05


def test_modules_inside_a_block_get_a_hook_when_something_is_first_done_there(
    tiny: HookedModel,
) -> None:
    lean = share(tiny)

    def n_hooked() -> int:
        parts = [*lean.module.modules()]
        return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in parts)

    prompt = prompts_of(tiny)[0].to_tensor()
    before = whole_pass(lean, prompt)
    at_first = n_hooked()
    for n, site in enumerate(("attn_z", "mlp_out"), start=1):
        for _ in range(2):
            with lean.at_sites({(site, 1): lambda x: 2.0 * x}):
                assert (whole_pass(lean, prompt) - before).abs().max() > 0.01
            assert n_hooked() == at_first + 4 * n
    assert torch.equal(whole_pass(lean, prompt), before)


@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        ("gpt2", "attn.c_proj", "mlp"),
        ("gpt_neox", "attention.dense", "mlp"),
        ("phi", "self_attn.dense", "mlp"),
        ("opt", "self_attn.out_proj", "fc2"),
    ],
)
def test_a_site_is_found_under_the_familys_own_names(name: str, attention: str, mlp: str) -> None:
    lean = share(family(name))
    names = {id(module): path for path, module in lean.module.named_modules()}
    for site, expected in (("attn_z", attention), ("mlp_out", mlp)):
        found = [names[id(module)] for module in lean.sites[site]]
        assert [path.split(f"{layer}.", 1)[1] for layer, path in enumerate(found)] == [
            expected
        ] * len(found)


def test_what_is_done_at_blocks_ends_with_an_exception(tiny: HookedModel) -> None:
    lean = share(tiny)
    prompt = prompts_of(tiny)[0].to_tensor()
    before = whole_pass(lean, prompt)

    def failing(resid: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        with lean.at_blocks({0: failing}):
            whole_pass(lean, prompt)
    assert torch.equal(whole_pass(lean, prompt), before)


def test_device_and_dtype_are_those_of_the_parameters(tiny_folder: Path) -> None:
    lean = share(load_model(tiny_folder, dtype="bfloat16"))
    assert (lean.device, lean.dtype) == (torch.device("cpu"), torch.bfloat16)


def test_a_model_without_a_module_of_its_own_cannot_be_shared(
    hooked_transformer: HookedModel,
) -> None:
    with pytest.raises(UnfitModelError) as caught:
        share(hooked_transformer)
    assert caught.value.reason == "HookedTransformer has no Hugging Face module to share"
    assert str(caught.value) == (
        "the lean executor must be able to share the model's module, but HookedTransformer has no "
        'Hugging Face module to share; use executor="auto" or "hooks".'
    )


@pytest.mark.parametrize(
    ("name", "value"), [("is_quantized", True), ("hf_device_map", {"": "cpu"})]
)
def test_quantised_or_spread_weights_cannot_be_shared(
    tiny_folder: Path, name: str, value: object
) -> None:
    model: Any = load_model(tiny_folder)
    setattr(model.original_model, name, value)
    with pytest.raises(UnfitModelError, match="its weights are quantised or spread over devices"):
        share(model)


def test_a_bridge_whose_layers_were_wrapped_cannot_be_shared(tiny_folder: Path) -> None:
    model: Any = load_model(tiny_folder)
    norm = model.original_model.model.norm
    model.original_model.model.norm = torch.nn.Sequential(norm)
    with pytest.raises(UnfitModelError, match=r"does not hold its tensor model\.norm\.weight"):
        share(model)


def masks_of(lean: Lean, allowed: list[list[int]], columns: list[list[int]]) -> Any:
    return attention_masks(lean, torch.tensor(allowed), torch.tensor(columns))


def as_text(mask: torch.Tensor) -> list[str]:
    """One string a row and query: x is seen, . is hidden; nothing else may be in a mask."""
    low = torch.finfo(mask.dtype).min
    assert bool(((mask == 0) | (mask == low)).all())
    return ["".join("." if value else "x" for value in query) for query in mask.flatten(0, 2)]


def test_a_query_sees_the_columns_up_to_its_position_and_no_padding(tiny: HookedModel) -> None:
    lean = share(tiny)
    mask = masks_of(lean, [[2, 3], [1, 2]], [[0, 1, 2, 3], [-1, 0, 1, 2]])
    assert mask.shape == (2, 1, 2, 4)
    assert mask.dtype == torch.float32
    assert as_text(mask) == ["xxx.", "xxxx", ".xx.", ".xxx"]
    # a slot cache has one row of columns for all, and padding itself sees nothing
    assert as_text(masks_of(lean, [[0], [3], [-1]], [[0, 1, 2, 3]])) == ["x...", "xxxx", "...."]


def test_a_window_ends_so_many_columns_before_the_query(tiny: HookedModel) -> None:
    lean = share(tiny)
    one = Lean(lean.module, {"full_attention": 2})
    assert as_text(masks_of(one, [[0, 1, 2, 3]], [[0, 1, 2, 3]])) == [
        "x...",
        "xx..",
        ".xx.",
        "..xx",
    ]
    two = masks_of(
        Lean(lean.module, {"sliding_attention": 1, "full_attention": None}), [[2]], [[0, 1, 2]]
    )
    assert {kind: as_text(mask) for kind, mask in two.items()} == {
        "sliding_attention": ["..x"],
        "full_attention": ["xxx"],
    }


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("gpt2", {"full_attention": None}),
        ("mistral", {"full_attention": 4}),
        ("gemma2", {"sliding_attention": 4, "full_attention": None}),
        ("qwen2_windows", {"full_attention": None, "sliding_attention": 4}),
    ],
)
def test_the_masks_are_those_of_the_configuration(name: str, masks: dict[str, int | None]) -> None:
    assert share(family(name)).masks == masks


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attention_is_the_softmax_of_scaled_capped_masked_scores(
    softcap: float | None, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn((2, heads, length, 5), generator=generator, dtype=dtype)
        for heads, length in ((6, 3), (2, 4), (2, 4))
    )
    mask = torch.zeros((2, 1, 3, 4), dtype=dtype)
    mask[1, :, :, 0] = torch.finfo(dtype).min
    mask[:, :, 0, 2:] = torch.finfo(dtype).min
    before = [tensor.clone() for tensor in (query, key, value, mask)]
    mixed, weights = attention(
        torch.nn.Module(), query, key, value, mask, scaling=0.3, softcap=softcap
    )
    assert weights is None
    assert mixed.dtype == dtype
    for b in range(2):
        for h in range(6):
            scores = 0.3 * query[b, h] @ key[b, h // 3].T
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            by_hand = (scores + mask[b, 0]).softmax(dim=-1) @ value[b, h // 3]
            assert torch.allclose(mixed[b, :, h], by_hand, atol=1e-6)
    assert all(
        torch.equal(one, other)
        for one, other in zip(before, (query, key, value, mask), strict=True)
    )


def test_attention_in_half_precision_is_that_of_the_same_numbers_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((1, 2, 1, 8), generator=generator).bfloat16()
    key, value = (torch.randn((1, 2, 256, 8), generator=generator).bfloat16() for _ in range(2))
    mask = torch.zeros((1, 1, 1, 256), dtype=torch.bfloat16)
    mixed, _ = attention(torch.nn.Module(), query, key, value, mask, scaling=0.5)
    wide, _ = attention(
        torch.nn.Module(), query.float(), key.float(), value.float(), mask.float(), scaling=0.5
    )
    assert mixed.dtype == torch.bfloat16
    assert (mixed - wide).abs().max() < 0.02 * value.abs().max()


def test_a_query_that_sees_nothing_attends_evenly() -> None:
    value = torch.tensor([1.0, 2.0, 6.0]).view(1, 1, 3, 1)
    low = torch.full((1, 1, 1, 3), torch.finfo(torch.float32).min)
    mixed, _ = attention(torch.nn.Module(), torch.ones(1, 1, 1, 1), value, value, low, scaling=1.0)
    assert float(mixed) == pytest.approx(3.0)


@pytest.mark.parametrize("name", ["position_bias", "s_aux"])
def test_an_attention_that_takes_more_is_refused(name: str) -> None:
    one = torch.ones(1, 1, 1, 1)
    more: dict[str, Any] = {name: one}
    with pytest.raises(UnfitModelError, match=f"its attention takes {name}"):
        attention(torch.nn.Module(), one, one, one, one, scaling=1.0, **more)
    mixed, _ = attention(torch.nn.Module(), one, one, one, one, scaling=1.0, **{name: None})
    assert float(mixed) == 1.0


def test_lean_of_gives_the_shared_module_of_the_model(tiny: HookedModel) -> None:
    assert shares(lean_of(tiny), tiny)
