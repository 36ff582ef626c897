from __future__ import annotations

import math

import torch

from fusion_lens.operators import add, mean_shift


def test_add_changes_masked_positions_alone() -> None:
    resid = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]])
    shift = torch.tensor([[10.0, 0.0], [0.0, -1.0]])
    mask = torch.tensor([[False, True], [True, True]])
    expected = [[[1.0, 2.0], [13.0, 4.0]], [[5.0, 5.0], [7.0, 7.0]]]
    assert add(resid, shift, mask).tolist() == expected


def test_outside_the_mask_negative_zero_and_nan_stay_what_they_are() -> None:
    resid = torch.tensor([[[-0.0, math.nan]]])
    out = add(resid, torch.zeros(1, 2), torch.tensor([[False]]))
    assert math.copysign(1.0, out[0, 0, 0]) == -1.0
    assert math.isnan(out[0, 0, 1])


def test_mean_shift_is_the_formula_with_the_mean_of_the_present_positions() -> None:
    # row [[2], [4], [9]], position 2 absent: m = 3; h = 10, c = 0.5: shift = 0.5 * (10 - 3) = 3.5
    resid = torch.tensor([[[2.0], [4.0], [9.0]]])
    present = torch.tensor([[True, True, False]])
    mask = torch.tensor([[False, True, True]])
    out = mean_shift(resid, torch.tensor([[10.0]]), torch.tensor([0.5]), present, mask)
    assert out.tolist() == [[[2.0], [7.5], [12.5]]]


def test_an_absent_nan_does_not_enter_the_mean() -> None:
    resid = torch.tensor([[[math.nan], [4.0]]])
    seen = torch.tensor([[False, True]])
    out = mean_shift(resid, torch.tensor([[6.0]]), torch.tensor([1.0]), seen, seen)
    assert out[0, 1, 0] == 6.0


def test_a_shift_is_added_in_float32_and_rounded_once() -> None:
    # 256 + 1.5 = 257.5 in float32, 258 in bfloat16; with the shift rounded first it is 258 too, but
    # 1.01 rounds to 1.0078125 and 255 + 1.01 = 256.01 to 256
    resid = torch.tensor([[[256.0, 255.0]]], dtype=torch.bfloat16)
    out = add(resid, torch.tensor([[1.5, 1.01]]), torch.tensor([[True]]))
    assert out.dtype == torch.bfloat16
    assert out.tolist() == [[[258.0, 256.0]]]


def test_the_running_mean_of_a_half_precision_stream_is_taken_in_float32() -> None:
    # 1, 1, ..., 1, 257 in bfloat16: a bfloat16 sum sticks at 256; the mean is 2 exactly
    resid = torch.ones(1, 256, 1, dtype=torch.bfloat16)
    resid[0, -1, 0] = 257.0  # stored as 256
    present = torch.ones(1, 256, dtype=torch.bool)
    out = mean_shift(resid, torch.tensor([[0.0]]), torch.tensor([1.0]), present, present)
    mean = (255 * 1.0 + 256.0) / 256
    assert out[0, 0, 0] == torch.tensor(1.0 - mean).bfloat16()
