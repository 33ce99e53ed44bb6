"""The products of the backward with tensor-core operands.

Contract: float16 dlogits keep every digit that float16 has, however small they are, and their products come back to
scale; one rounding serves both products; products are the float32 products of the rounded operands, whatever the number
of blocks. Tensor cores are stood in for: ``torch.mm`` here knows no ``out_dtype``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from xloss.head import gemm

C, H, V = 7, 5, 41


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 products on a CPU, written in float32, over blocks of 16 rows."""
    plain_mm, plain_addmm = torch.mm, torch.addmm

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        return plain_mm(a.to(out_dtype), b.to(out_dtype), out=out)

    def addmm(acc: Tensor, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        return plain_addmm(acc, a.to(out_dtype), b.to(out_dtype), out=out)

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(torch, "addmm", addmm)
    monkeypatch.setattr(gemm, "_tensor_cores", lambda x: True)
    monkeypatch.setattr(gemm, "WIDEN_ROWS", 16)


@pytest.mark.parametrize("size", [1e-30, 1e-8, 1.0, 3e7])
def test_half_keeps_its_digits(size: float) -> None:
    given = torch.randn(C, V, generator=torch.Generator().manual_seed(0)) * size
    dz = gemm.scale_to_half_(given.clone())
    assert dz.values.dtype == torch.float16 and 0.5 <= float(dz.values.abs().max()) <= 1
    assert dz.scale is not None and float(dz.scale.log2()) % 1 == 0
    back = dz.values.float() * dz.scale
    assert budgets.error(back, given) <= budgets.eps(torch.float16) * budgets.norm(given)


def test_nothing_to_scale() -> None:
    dz = gemm.scale_to_half_(torch.zeros(C, V))
    assert dz.scale is not None and bool((dz.values == 0).all()) and bool(torch.isfinite(dz.scale))


def test_elsewhere_dlogits_stay_as_they_are() -> None:
    """On a CPU operands are widened; float32 is an operand anywhere."""
    given = torch.randn(C, V)
    for operand in (torch.float32, torch.bfloat16, torch.float16):
        assert gemm.narrow_(given, operand).values is given


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
def test_products_come_back_to_scale(first: bool, dtype: torch.dtype, tensor_cores: Any) -> None:
    g = torch.Generator().manual_seed(1)
    given = torch.randn(C, V, generator=g) * 1e-9
    hidden, weight = torch.randn(C, H, generator=g).to(dtype), torch.randn(V, H, generator=g).to(dtype)
    dz = gemm.scale_to_half_(given.clone()) if dtype == torch.float16 else gemm.Dlogits(given.to(dtype))
    before = torch.full((V, H), torch.nan) if first else torch.randn(V, H, generator=g) * 1e-9
    acc = before.clone()
    gemm.add_grad_weight(acc, dz, hidden, first)
    gold = given.double()
    want_weight = gold.t() @ hidden.double() + (0 if first else before.double())
    want_hidden = gold @ weight.double()
    for got, want in ((acc, want_weight), (gemm.grad_hidden(dz, weight), want_hidden)):
        assert got.dtype == torch.float32
        assert budgets.error(got, want) <= 2 * budgets.eps(dtype) * budgets.norm(gold) * budgets.norm(hidden)
