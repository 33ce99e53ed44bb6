"""``xloss verify``: is every way to lay out one optimizer step the same as one process, on this machine and shape?"""

from __future__ import annotations

from xloss.cli.verify.options import VerifyOptions


def verify(*, options: VerifyOptions = VerifyOptions()) -> int:  # noqa: B008 (frozen)
    """Check that gradients are those of one process however a step is laid out, on this machine and shape.

    Runs a small model through chunks, packs, micro-batches, DDP, FSDP2 and the other layouts, and compares gradients,
    loss, log-probs and metrics with those of one process. Starts 2 processes itself, or is one of those that
    `torchrun --nproc-per-node N -m xloss verify` started. Exit status 0 if every layout is right, 1 if not.
    """
    from xloss.cli.verify import run  # FSDP2 and DDP take a second to import: not for every command

    return run.verify(options)
