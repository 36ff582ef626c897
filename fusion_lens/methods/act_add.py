"""ActAdd: what one prompt does and another does not is added to the first tokens of any.

At one layer l, token by token t, with h the residual stream after the block (`resid_post`),

    x[t] <- x[t] + c * (h(plus)[t] - h(minus)[t])

The paper (Turner et al. 2023, arXiv 2308.10248) reads the stream as it enters a block: its layer l
is l - 1 here. The shorter prompt is filled with spaces on the right, as there.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from fusion_lens.deltas import Deltas
from fusion_lens.errors import ContrastError
from fusion_lens.identity import ModelIdentity, identify
from fusion_lens.models import HookedModel
from fusion_lens.plans import Plan, Segment, Step, one_layer
from fusion_lens.prompts import NO_PROMPT, Prompt, continuation, tokenize
from fusion_lens.teacher_forcing import Text, record_streams


def act_add(
    model: HookedModel, plus: str, minus: str, layer: int, *, executor: str = "auto"
) -> Plan:
    """A step for every place at which the two prompts differ, in residual units; its strength is
    the paper's c (1 to 15 there).

    Places up to which both have the same tokens, BOS among them, differ by nothing and have no
    step, nor have special tokens. A steered prompt that is shorter is steered as far as it goes.

    Raises:
        ContrastError: if the prompts are the same, or of unequal length and the tokenizer has no
            single token for a space.
        PlanError: if the model has no such layer.

    References:
        Turner et al., Activation Addition: Steering Language Models Without Optimization, arXiv
        2308.10248.
    """
    identity = identify(model)
    segments = one_layer(layer, identity.n_layers)
    prompts = _of_one_length(model, tokenize(model, plus), tokenize(model, minus))
    places = _places(*prompts)
    if not places:
        raise ContrastError(
            "the two prompts must differ in a token that is not special, "
            f"but got {plus!r} and {minus!r}."
        )
    read = record_streams(model, [Text(prompt) for prompt in prompts], executor=executor)
    h_plus, h_minus = (streams.leaving[layer] for streams in read)
    return Plan(tuple(_step(t, h_plus[t], h_minus[t], segments, identity) for t in places))


def _step(
    t: int,
    plus: Float[Tensor, " d_model"],
    minus: Float[Tensor, " d_model"],
    segments: tuple[Segment, ...],
    model: ModelIdentity,
) -> Step:
    (segment,) = segments
    reference, base = torch.zeros((2, model.n_layers, model.d_model), dtype=plus.dtype)
    reference[segment.start], base[segment.start] = plus, minus
    deltas = Deltas(reference=reference, base=base, layout=NO_PROMPT, model=model)
    return Step(deltas, segments, (1.0,), positions=t)


def _places(plus: Prompt, minus: Prompt) -> list[int]:
    """Where the prompts differ, by the token there or one before it."""
    special = {*plus.special, *minus.special}
    return [
        t
        for t in range(len(plus.tokens))
        if plus.tokens[: t + 1] != minus.tokens[: t + 1] and t not in special
    ]


def _of_one_length(model: HookedModel, plus: Prompt, minus: Prompt) -> tuple[Prompt, Prompt]:
    n_plus, n_minus = len(plus.tokens), len(minus.tokens)
    if n_plus == n_minus:
        return plus, minus
    space = continuation(model, plus if n_plus < n_minus else minus, " ")
    (name,) = model.tokenizer.convert_ids_to_tokens(space) if len(space) == 1 else (None,)
    if name is None or name in (*model.tokenizer.all_special_tokens, model.tokenizer.unk_token):
        raise ContrastError(
            f"the two prompts must have as many tokens, but got {n_plus} and {n_minus}, and the "
            "tokenizer has no single token for a space to fill the shorter one with; make them "
            "equal."
        )
    length = max(n_plus, n_minus)
    return _filled(plus, space, name, length), _filled(minus, space, name, length)


def _filled(prompt: Prompt, space: tuple[int, ...], name: str, length: int) -> Prompt:
    n = length - len(prompt.tokens)
    return replace(
        prompt,
        text=prompt.text + " " * n,
        tokens=prompt.tokens + space * n,
        str_tokens=prompt.str_tokens + (name,) * n,
    )
