"""Which kernels and what sizes, from sizes alone.

Contract: chunks of logits where the budget holds useful ones, none where it does not or where none are allowed; what is
asked for is done or is an error that names the option and what can do it; a chunk is never smaller than what costs no
memory, never larger than the budget or 8192 tokens; strips keep the budget; the plan says all of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xloss.errors import OptionError, UnsupportedError
from xloss.head.choice import (
    DEFAULT_BUDGET,
    MIB,
    SPLIT_COLUMNS,
    USEFUL_ROWS,
    PlanRequest,
    budget_of,
    choose,
    partial_bytes,
    strip_shape,
)
from xloss.head.dispatch import RunOptions
from xloss.head.plan import make_plan
from xloss.stats import StatSpec

GIB = 1 << 30
H, V = 4096, 128256  # Llama 3


def request(tokens: int = 8192, **changes: Any) -> PlanRequest:
    """A bf16 call on CUDA."""
    sizes = {"num_rows": tokens, "num_live": tokens, "num_grad": tokens}
    base = PlanRequest("one-pass", "fused", **sizes, hidden_size=H, vocab_size=V, logit_bytes=4, device_type="cuda",
                       operand_bytes=2, strip_bytes=2, weight_bytes=2, hidden_bytes=2, waiting_bytes=2)  # fmt: skip
    return replace(base, **changes)


def forward(tokens: int = 8192, **changes: Any) -> PlanRequest:
    return request(tokens, kind="forward-only", num_grad=0, **changes)


# -- chunks of logits or none


@pytest.mark.parametrize("kind", ["one-pass", "two-pass", "forward-only"])
@pytest.mark.parametrize("vocab", [32000, 128256, 151936, 256000, 262208])
def test_the_default_budget_holds_useful_chunks(kind: Any, vocab: int) -> None:
    """Nobody gets other kernels than cuBLAS and row work without asking for a smaller budget."""
    found = choose(request(65536, kind=kind, vocab_size=vocab))
    assert found.kernels == "chunked_logits" and found.rows >= USEFUL_ROWS[2]


@pytest.mark.parametrize("make", [request, forward])
@pytest.mark.parametrize(("operand", "useful"), USEFUL_ROWS.items())
def test_a_budget_below_a_useful_chunk(make: Any, operand: int, useful: int) -> None:
    """One token more or less decides; fewer tokens in all than a useful chunk are one chunk."""
    sizes = {"operand_bytes": operand, "weight_bytes": operand}
    for rows, kernels in ((useful, "chunked_logits"), (useful - 1, "no_logits")):
        found = choose(make(logits_budget=rows * V * 4, **sizes))
        assert found.kernels == kernels
    few = make(useful // 2, logits_budget=useful // 2 * V * 4, **sizes)
    assert (choose(few).kernels, choose(few).rows) == ("chunked_logits", useful // 2)
    assert f"holds the logits of {useful - 1} tokens, {useful} would be useful" in found.why[0]


@pytest.mark.parametrize("kind", ["one-pass", "two-pass", "forward-only"])
@pytest.mark.parametrize("wish", [{"logits_budget": 0}, {"kernels": "no_logits"}])
def test_no_logits_on_request(kind: Any, wish: dict[str, Any]) -> None:
    plan = make_plan(request(kind=kind, num_grad=0 if kind == "forward-only" else 8192, **wish))
    assert plan.kernels == "no_logits"
    assert plan.saved_chunks == 0 and plan.num_chunks == 1
    assert any("no logits are written" in reason for reason in plan.reasons)
    products = 2 * H * V * 8192
    assert plan.flops == products * (1 if kind == "forward-only" else 4)


def test_chunked_logits_on_request() -> None:
    """Also where the budget holds less than a useful chunk."""
    plan = make_plan(request(kernels="chunked_logits", logits_budget=256 * V * 4))
    assert (plan.kernels, plan.chunk_rows) == ("chunked_logits", 256)
    assert "kernels='chunked_logits' was asked for" in plan.reasons


def test_chunk_size_is_obeyed_by_both() -> None:
    small = request(chunk_size=500, logits_budget=MIB)
    assert (choose(small).kernels, choose(small).rows) == ("chunked_logits", 500)
    for wish in ({"logits_budget": 0}, {"kernels": "no_logits", "logits_budget": None}):
        plan = make_plan(replace(small, **wish))
        assert plan.kernels == "no_logits" and plan.chunk_rows <= 500 and plan.num_chunks == 17


@pytest.mark.parametrize("wish", [{"logits_budget": 0}, {"kernels": "no_logits"}])
def test_modes_without_such_kernels_say_so(wish: dict[str, Any]) -> None:
    name = next(iter(wish))
    for mode in ("chunk",):
        with pytest.raises(UnsupportedError, match=rf"{name}=.*mode='{mode}' has none; use mode='fused'"):
            choose(request(mode=mode, **wish))
    with pytest.raises(UnsupportedError, match=rf"{name}=.*strides \(1, 7\)"):
        choose(request(no_logits_refused="head_weight has strides (1, 7)", **wish))


@pytest.mark.parametrize(
    "wish", [{"logits_budget": 0}, {"kernels": "no_logits"}, {"kernels": "chunked_logits"}, {"main_grad": True}]
)
@pytest.mark.parametrize(("kind", "remedy"), [("eager", "; use mode="), ("chunked-autograd", "define token_loss")])
def test_autograd_can_honour_none_of_it(kind: Any, remedy: str, wish: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=remedy):
        choose(request(kind=kind, mode="eager", **wish))


@pytest.mark.parametrize("small", [256 * V * 4, V * 4])
def test_auto_takes_chunks_where_no_logits_cannot_run(small: int) -> None:
    for refused in ({"mode": "chunk"}, {"no_logits_refused": "strides"}):
        assert choose(request(logits_budget=small, **refused)).kernels == "chunked_logits"


@pytest.mark.parametrize("wrong", [{"kernels": "triton"}, {"logits_budget": -1}, {"logits_budget": 0.5},
                                   {"logits_budget": 0, "kernels": "chunked_logits"}])  # fmt: skip
def test_wishes_that_are_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        RunOptions(**wrong)


# -- sizes of chunks


@pytest.mark.parametrize(("tokens", "rows"), [(100, 100), (4096, 4096), (4185, 4185), (4186, 2176), (8192, 4096)])
def test_one_chunk_that_fits_or_equal_ones(tokens: int, rows: int) -> None:
    """2 GiB hold 4185 tokens at V = 128256; equal chunks are multiples of 128 tokens."""
    assert choose(request(tokens)).rows == rows


def test_chunks_are_at_most_8192_tokens() -> None:
    assert choose(request(20000, vocab_size=32000)).rows == 6784  # three, where 2 GiB hold 16777
    assert choose(request(20000, vocab_size=32000, logits_budget=8 * GIB)).rows == 20000


@pytest.mark.parametrize("weight_bytes", [2, 4])
@pytest.mark.parametrize("hidden_size", [512, 8192, 16384])
def test_a_single_chunk_where_it_costs_no_memory(hidden_size: int, weight_bytes: int) -> None:
    """Peak of a step: logits and the float32 dW together, later that dW and its copy in the weight's dtype."""
    vocab, budget = 152064, DEFAULT_BUDGET["cuda"]
    cast = vocab * hidden_size * weight_bytes if weight_bytes != 4 else 0
    sizes = {"hidden_size": hidden_size, "vocab_size": vocab, "weight_bytes": weight_bytes}
    free = max(budget, cast) // (vocab * 4)
    assert free == max(budget // (vocab * 4), hidden_size * weight_bytes // 4 if cast else 0)
    for tokens, single in ((free, True), (free + 1, False)):
        assert (choose(request(tokens, **sizes)).rows == tokens) is single

    def peak(rows: int) -> int:
        dw = vocab * hidden_size * 4
        return max(rows * vocab * 4 + dw, dw + cast)

    assert peak(free) <= max(peak(budget // (vocab * 4)), peak(0))


@pytest.mark.parametrize(
    "changes",
    [{"kind": "forward-only", "num_grad": 0}, {"weight_grad": False}, {"main_grad": True}, {"device_type": "cpu"},
     {"logits_budget": GIB}],
)  # fmt: skip
def test_only_a_cast_to_come_makes_room(changes: dict[str, Any]) -> None:
    """No gradient, a frozen head, main_grad, a CPU, a budget of one's own: the budget is the budget."""
    big = request(hidden_size=16384, vocab_size=152064, **changes)
    assert budget_of(big) == (big.logits_budget or DEFAULT_BUDGET[big.device_type])


# -- strips


@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize(("tokens", "shape"), [(1, (1, 4096)), (8192, (8192, 4096)), (65536, (32768, 4096)),
                                               (40000, (20000, 4096))])  # fmt: skip
def test_the_usual_strip(tokens: int, shape: tuple[int, int], budget: int | None) -> None:
    assert strip_shape(request(tokens, logits_budget=budget)) == shape
    assert strip_shape(request(tokens, logits_budget=budget, vocab_size=300)) == (shape[0], 512)


@pytest.mark.parametrize("budget", [256 << 10, 3 * MIB, 20 * MIB, 64 * MIB, 10 * GIB])
@pytest.mark.parametrize("tokens", [7, 200, 8192, 100000])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("kind", ["one-pass", "forward-only"])
def test_a_strip_keeps_its_budget(kind: Any, tokens: int, budget: int, width: int) -> None:
    """So do the partial statistics: 24 bytes a token and 1024 columns of the vocabulary."""
    grad = 0 if kind == "forward-only" else tokens
    asked = request(tokens, kind=kind, num_grad=grad, kernels="no_logits", logits_budget=budget, strip_bytes=width)
    few = min(tokens, 128)
    needed = few * max(24 * 126, 1024 * width if grad else 0)
    if budget < needed:
        assert strip_shape(asked) is None
        with pytest.raises(UnsupportedError, match=rf"{needed} bytes for {few} tokens.*logits_budget={budget};"):
            make_plan(asked)
        return
    plan = make_plan(asked)
    assert 0 < plan.logits_bytes <= budget and 0 < plan.chunk_rows <= tokens
    assert plan.chunk_rows >= few or plan.num_chunks > 1
    if grad:
        assert 1024 <= plan.strip_columns <= 4096 and plan.strip_columns % 256 == 0


def test_no_strip_without_a_gradient() -> None:
    assert strip_shape(forward(100000)) == (25000, 0)


def test_memory_of_a_plan_without_logits() -> None:
    """The larger of a strip and the partial statistics; dX of a chunk is added up beside the whole one."""
    plan = make_plan(request(logits_budget=0))
    assert plan.logits_bytes == 8192 * 4096 * 2
    assert plan.grad_bytes == H * (4 * V + 2 * 8192 + 4 * 8192)  # dX waits in bf16
    partials = partial_bytes(V, 8192)
    narrow = make_plan(request(kernels="no_logits", logits_budget=partials))
    assert narrow.strip_columns == 1280 and narrow.logits_bytes == partials == 24 * 126 * 8192
    assert make_plan(forward(logits_budget=0)).logits_bytes == partials
    assert [s.stop - s.start for s in plan.strips(V)] == [4096] * 31 + [V - 31 * 4096]


def test_main_grad_saves_the_buffer_in_two_passes() -> None:
    two, one = (make_plan(request(kind=kind, main_grad=True)) for kind in ("two-pass", "one-pass"))
    assert one.grad_bytes - two.grad_bytes == 4 * H * V
    assert "main_grad" in two.reasons[-1] and "main_grad" in one.reasons[-1]
    assert "main_grad" not in str(make_plan(request(main_grad=True, weight_grad=False)))


# -- what stands beside logits and gradients


def test_gradients_are_rounded_when_the_logits_are_gone() -> None:
    """dW is bf16 beside its float32 sum, or goes to main_grad; dX waits in bf16; float32 is handed out as it is."""
    for kind in ("one-pass", "two-pass"):
        plan = make_plan(request(kind=kind))
        assert plan.copy_bytes == 2 * H * V
        assert plan.peak_bytes == plan.grad_bytes + max(plan.logits_bytes + plan.scratch_bytes, plan.copy_bytes)
        assert make_plan(request(kind=kind, main_grad=True)).copy_bytes == 0
        assert make_plan(request(kind=kind, weight_grad=False)).copy_bytes == 0
        wide = {"operand_bytes": 4, "strip_bytes": 4, "weight_bytes": 4, "hidden_bytes": 4, "waiting_bytes": 4}
        assert make_plan(request(kind=kind, **wide)).copy_bytes == 0
        half = make_plan(request(kind=kind, strip_bytes=4, waiting_bytes=4))
        assert half.copy_bytes == 2 * H * (V + 8192)
    assert make_plan(forward()).copy_bytes == 0
    assert make_plan(request(retain=True)).copy_bytes == 2 * H * (V + 8192)


def test_dlogits_for_tensor_cores() -> None:
    """A bf16 copy in torch ops, a float16 copy in any mode, none where a kernel writes bf16 over the logits."""
    rows, sizes = 1024, {"chunk_size": 1024, "kernels": "chunked_logits"}
    fused, torch_ops = make_plan(request(**sizes)), make_plan(request(mode="chunk", **sizes))
    half = make_plan(request(strip_bytes=4, waiting_bytes=4, **sizes))
    copy, operands = 2 * rows * V, 2 * rows * H
    assert fused.scratch_bytes == operands + rows * H * (4 + 2)
    assert torch_ops.scratch_bytes == operands + copy + rows * H * (4 + 2)
    assert half.scratch_bytes == operands + copy + 8192 * H * 4  # a block of dW, brought back to scale
    strips = make_plan(request(logits_budget=0, strip_bytes=4, waiting_bytes=4))
    assert strips.scratch_bytes == 2 * 8192 * H + 2 * 8192 * 4096 + 8192 * H * 4


@pytest.mark.parametrize("device_type,budget", [("cpu", 4 * MIB), ("cuda", 256 * MIB)])
def test_blocks_of_torch_row_work(device_type: str, budget: int) -> None:
    """None for log-probs alone, which softmax in place serves; one for others; one more for entropy or a softcap."""
    float32 = dict.fromkeys(("operand_bytes", "weight_bytes", "waiting_bytes", "strip_bytes", "hidden_bytes"), 4)
    sizes = {**float32, "device_type": device_type, "mode": "chunk", "hidden_size": 1, "chunk_size": 4096,
             "logits_budget": GIB}  # fmt: skip
    block = budget // (4 * V) * 4 * V

    def blocks(**changes: Any) -> int:
        return round(make_plan(request(**{**sizes, **changes})).scratch_bytes / block)

    def stats(name: str) -> dict[str, StatSpec]:
        return {"stats": StatSpec(**{name: True})}

    assert blocks() == blocks(**stats("top1")) == blocks(**stats("mean_logit")) == 0
    assert blocks(**stats("sum_p2")) == blocks(num_grad=8000) == 1
    assert blocks(**stats("entropy")) == blocks(softcap=True) == 2
    assert blocks(kind="two-pass") == blocks(kind="forward-only", num_grad=0) == 1
    assert blocks(kind="forward-only", num_grad=0, **stats("entropy")) == 2
    assert blocks(kind="forward-only", num_grad=0, softcap=True) == 1
    assert blocks(mode="fused", softcap=True, **stats("entropy")) == 0


def test_statistics_beside_kept_chunks_count() -> None:
    """Tokens without a gradient come after the kept chunks: their logits stand beside those, within the budget."""
    sizes = {"kind": "two-pass", "chunk_size": 1024, "vocab_size": 32000}
    for budget in (4, 5, 8, 9):
        plan = make_plan(request(8192, num_grad=4096, logits_budget=budget * 1024 * 32000 * 4, **sizes))
        assert plan.saved_chunks == min(4, budget - 1)
        assert plan.logits_bytes == (plan.saved_chunks + 1) * 1024 * 32000 * 4 <= budget * 1024 * 32000 * 4


# -- what the plan says


def test_what_explain_prints() -> None:
    """The page on plans shows it; this machine may have no GPU to print it on."""
    page = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
    shown = page.split("<!-- plan: no logits -->\n```text\n")[1].split("\n```")[0]
    assert str(make_plan(request(kind="two-pass", logits_budget=0))) == shown
    assert "  memory 23.6 MiB of partial statistics, 0 B of gradients\n" in str(make_plan(forward(kernels="no_logits")))


def test_partials_are_cut_as_the_kernels_cut_them() -> None:
    tiles = pytest.importorskip("xloss_kernels.tiles")
    head_forward = pytest.importorskip("xloss_kernels.head_forward")
    import torch

    for dtype in (torch.float32, torch.bfloat16):
        for arch in (80, 90, 100):
            assert tiles.head_tile(dtype, arch).split == SPLIT_COLUMNS
    assert partial_bytes(SPLIT_COLUMNS + 1, 3) == 2 * 3 * head_forward.NUM_PARTIALS * 4
