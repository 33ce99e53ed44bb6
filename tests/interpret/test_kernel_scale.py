"""scale_ and cast_scale: one rounding, nothing touched at 1, any size."""

from __future__ import annotations

import pytest
import torch

from xloss_kernels.scale import cast_scale, scale_


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 50000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale(size, dtype):
    x = torch.randn(size).to(dtype)
    wanted = (x.float() * 0.3).to(dtype)
    assert torch.equal(scale_(x, torch.tensor(0.3)), wanted)


def test_scale_by_one_touches_nothing():
    bits = torch.full((10,), 0x7F800001, dtype=torch.int32)  # signalling NaNs, which any product would quieten
    before = bits.clone()
    scale_(bits.view(torch.float32), torch.tensor(1.0))
    assert torch.equal(bits, before)


@pytest.mark.parametrize("scale", [None, 0.3, 1.0, 0.0])
def test_cast(scale):
    x = torch.randn(7, 1000)
    factor = None if scale is None else torch.tensor([scale])
    out = cast_scale(x, torch.float16, factor)
    assert out.shape == x.shape and torch.equal(out, (x * (1.0 if scale is None else torch.tensor(scale))).half())


def test_launcher_refuses_a_strided_tensor():
    with pytest.raises(AssertionError):
        scale_(torch.ones(4, 4).t()[:, :2], torch.tensor(2.0))
