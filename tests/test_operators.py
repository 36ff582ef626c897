from __future__ import annotations

import math

import pytest
import torch

from fusion_lens.operators import add, affine, gate_value, mean_shift


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


ALL = torch.tensor([[True, True]])


def test_an_affine_move_is_the_formula_where_the_mask_holds() -> None:
    x = torch.tensor([[[1.0, 2.0], [3.0, -4.0]]])
    scale, shift = torch.tensor([[0.5, -2.0]]), torch.tensor([[1.0, 0.0]])
    gate = torch.tensor([[1.0, 0.25]])
    # 3 + (0.5*3 + 1)/4 = 3.625; -4 + (-2*-4)/4 = -2
    out = affine(x, scale, shift, torch.tensor([[False, True]]), gate=gate)
    assert out.tolist() == [[[1.0, 2.0], [3.625, -2.0]]]
    assert affine(x, scale, shift, ALL).tolist() == [[[2.5, -2.0], [5.5, 4.0]]]
    assert torch.equal(affine(x, None, shift, ALL), add(x, shift, ALL))


def test_a_unit_outside_its_bounds_stays_what_it_is_bit_for_bit() -> None:
    x = torch.tensor([[[1.0, -0.0], [2.0, math.nan]]])
    bounds = torch.tensor([[1.0, torch.inf]]), torch.tensor([[1.5, -torch.inf]])
    out = affine(x, torch.ones(1, 2), torch.ones(1, 2), ALL, bounds=bounds)
    assert out[0, :, 0].tolist() == [3.0, 2.0]
    assert math.copysign(1.0, out[0, 0, 1]) == -1.0
    assert math.isnan(out[0, 1, 1])


def test_bounds_hold_what_is_on_them() -> None:
    x = torch.tensor([[[1.0], [2.0]]])
    bounds = torch.tensor([[1.0]]), torch.tensor([[2.0]])
    assert affine(x, None, torch.ones(1, 1), ALL, bounds=bounds).tolist() == [[[2.0], [3.0]]]


def test_an_affine_move_of_a_half_precision_stream_is_rounded_once() -> None:
    # 255 + 0.0078125*255 + 1.01 = 258.002 and so 258; 1.0078125*255 alone is 256.99 and rounds to
    # 257 only in float32: in bfloat16 it is 256
    x = torch.tensor([[[255.0]]], dtype=torch.bfloat16)
    every = torch.tensor([[True]])
    out = affine(x, torch.tensor([[0.0078125]]), torch.tensor([[1.01]]), every)
    assert out.dtype == torch.bfloat16
    assert out.item() == 258.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gate_is_the_sigmoid_or_relu_of_theta_x_plus_bias(dtype: torch.dtype) -> None:
    x = torch.tensor([[[1.0, 2.0], [-3.0, 0.5]], [[0.0, 1.0], [4.0, 4.0]]], dtype=dtype)
    theta, bias = torch.tensor([[1.0, -1.0], [0.5, 0.25]]), torch.tensor([0.5, -1.0])
    # z: 1-2+0.5, -3-0.5+0.5; 0.25-1, 2+1-1
    z = torch.tensor([[-0.5, -3.0], [-0.75, 2.0]])
    sigmoid = gate_value(x, theta, bias, "sigmoid")
    assert sigmoid.dtype == torch.promote_types(dtype, torch.float32)
    assert (sigmoid - 1 / (1 + torch.exp(-z))).abs().max() < 1e-6
    assert gate_value(x, theta, bias, "relu").tolist() == [[0.0, 0.0], [0.0, 2.0]]
    assert gate_value(x, theta * 0, bias + 1e4, "sigmoid").tolist() == [[1.0, 1.0]] * 2
    assert gate_value(x, theta * 0, bias - 1e4, "sigmoid").tolist() == [[0.0, 0.0]] * 2


@pytest.mark.parametrize("kind", ["sigmoid", "relu"])
def test_a_tokens_gate_does_not_depend_on_its_place(kind: str) -> None:
    # torch.sigmoid would round the last numbers of a tensor otherwise than the rest
    generator = torch.Generator().manual_seed(0)
    x, theta = (
        torch.randn((1, 1, 24), generator=generator),
        torch.randn((1, 24), generator=generator),
    )
    for rows, length in ((1, 3), (3, 7), (5, 1), (8, 33), (64, 1)):
        many = gate_value(x.expand(rows, length, 24).contiguous(), theta, torch.ones(1), kind)
        assert many.unique().tolist() == gate_value(x, theta, torch.ones(1), kind)[0].tolist()
