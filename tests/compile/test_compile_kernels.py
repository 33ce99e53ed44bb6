"""Every launch a GPU would see compiles for sm_80, sm_90 and sm_100, within the machine's limits and without spills."""

from __future__ import annotations

import re

import pytest
import torch

from tests.compile.compiling import compiled, described
from xloss_kernels import dlogits, finalize, head_backward, head_forward, policy_rows, row_stats, scale, tiles
from xloss_kernels.compiled import ARCHS, SHARED_LIMIT, compile_launch, recording
from xloss_kernels.compiled_cases import CASES, Case, points

MATRIX = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
RARE = ("every option", "one token", "ieee")
"""Not hot: a register or two may spill."""
POINTS = [pytest.param(case, arch, id=f"{case.kernel}-{case.name}-sm{arch}") for case, arch in points()]


@pytest.mark.parametrize("case,arch", POINTS)
def test_limits(case: Case, arch: int):
    row = described(case, arch)
    assert row.registers <= 255
    assert row.spill_bytes <= (32 if any(word in case.name for word in RARE) else 0)
    assert row.shared_bytes <= SHARED_LIMIT[arch]
    if case.kernel.startswith("head_"):
        assert row.instruction == ("-" if "float32" in case.name else MATRIX[arch])


def find(kernel: str, name: str) -> Case:
    return next(case for case in CASES if (case.kernel, case.name) == (kernel, name))


def loops(ptx: str) -> list[str]:
    """The bodies of all innermost loops: from a label to a branch back to it, no other label between."""
    bodies = []
    for match in re.finditer(r"^(\$L__BB\d+_\d+):", ptx, re.M):
        body = re.match(rf"[^\0]*?bra(\.uni)?\s+{re.escape(match[1])};", ptx[match.end() :])
        if body and not re.search(r"^\$L__BB", body[0], re.M):
            bodies.append(body[0])
    return bodies


ROW_CASES = [
    ("row_stats_kernel", "float32, entropy"),
    ("row_stats_kernel", "bf16, entropy"),
    ("policy_rows_kernel", "ppo, float32"),
    ("policy_rows_kernel", "ppo, bf16"),
    ("policy_rows_kernel", "ppo, float32 to bf16"),
    ("policy_rows_kernel", "ppo, float32 to bf16 overlay"),
]


@pytest.mark.parametrize("kernel,name", ROW_CASES)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_softmax_loop_has_wide_loads_and_no_barrier(kernel: str, name: str, arch: int):
    """The first loop that reads and writes nothing: every load 16 bytes wide, lanes never meet."""
    body = next(
        body
        for body in loops(compiled(find(kernel, name), arch).asm["ptx"])
        if "ld.global" in body and "st.global" not in body
    )
    assert "ex2" in body and "bar.sync" not in body and "shfl" not in body
    assert all(".v4.b32" in line for line in body.splitlines() if "ld.global" in line)


@pytest.mark.parametrize(
    "kernel,name",
    [("dlogits_kernel", "float32 to bf16 overlay"), ("policy_rows_kernel", "ppo, float32 to bf16 overlay")],
)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_overlay_finishes_its_reads_before_it_writes(kernel: str, name: str, arch: int):
    """In both loops that read the row and write it (blocks, tail): all loads, a barrier, then the stores."""
    bodies = [
        body
        for body in loops(compiled(find(kernel, name), arch).asm["ptx"])
        if "ld.global" in body and "st.global" in body
    ]
    assert len(bodies) == 2
    for body in bodies:
        assert body.rindex("ld.global") < body.index("bar.sync") < body.index("st.global")


@pytest.mark.parametrize("arch", ARCHS)
def test_sizes_of_one(arch: int):
    """Triton turns an integer 1 into a constant of another type: one token, one label, one vocabulary entry."""
    one, label = torch.zeros(1, 1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.int64)
    vector, operand = torch.zeros(1), torch.zeros(1, 1, dtype=torch.bfloat16)
    tile = tiles.head_tile(torch.bfloat16, arch)
    everything = {"entropy": True, "mean_logit": True, "sum_p2": True, "top1": True}
    launches = [
        (row_stats, "row_stats_kernel", lambda: row_stats.row_stats(one, label, **everything)),
        (dlogits, "dlogits_kernel", lambda: dlogits.dlogits(one, label, vector, d_logprobs=vector)),
        (policy_rows, "policy_rows_kernel", lambda: policy_rows.policy_rows(one, label, policy_rows.PolicySpec("ce"))),
        (head_forward, "head_forward_kernel",
         lambda: head_forward.head_forward(operand, operand, label, tile=tile, **everything)),
        (finalize, "finalize_kernel", lambda: finalize.finalize(torch.zeros(1, 6, 1), vector, label, 1, **everything)),
        (head_backward, "head_dlogits_kernel",
         lambda: head_backward.head_dlogits(operand, operand, label, vector, d_logprobs=vector, tile=tile)),
        (scale, "scale_kernel", lambda: scale.cast_scale(vector, torch.bfloat16, vector)),
    ]  # fmt: skip
    for module, kernel, launch in launches:
        with recording(module, kernel) as recorder:
            launch()
        compile_launch(recorder, arch)


def test_tensor_descriptors_are_used_where_the_machine_has_them():
    case = find("head_forward_kernel", "bf16, entropy")
    assert "cp.async.bulk.tensor" in compiled(case, 90).asm["ptx"]
    assert "cp.async.bulk.tensor" not in compiled(case, 80).asm["ptx"]


def test_hopper_products_stay_asynchronous():
    ptx = compiled(find("head_forward_kernel", "bf16, entropy"), 90).asm["ptx"]
    assert "wgmma.wait_group.sync.aligned 1" in ptx  # one product in flight while the next is issued


def test_no_atomics():
    for case in CASES:
        ptx = compiled(case, 90).asm["ptx"]
        assert not re.search(r"\b(atom|red)\.(global|relaxed|acq)", ptx), case
