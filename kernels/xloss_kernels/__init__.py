"""Triton kernels of xloss: tensors in, tensors out.

A leaf package: it imports nothing of xloss, and importing it imports neither triton nor torch. One op a file:

    row_stats      logits [C, V] -> lse, logprobs, entropy, ... per row               (one read)
    dlogits        logits [C, V] and adjoints -> dlogits, in place or elsewhere        (one read, one write)
    policy_rows    logits [C, V] -> statistics, a built-in loss, dlogits in place      (two reads, one write)
    head_forward   hidden [T, H] x weight [V, H] -> partial statistics, no logits
    finalize       partial statistics -> the outputs of row_stats
    head_backward  hidden x weight and adjoints -> dlogits of a vocabulary strip       (recompute)
    scale          multiply by a device scalar, cast

Shared pieces: transform (scale, softcap, temperature, bias), online (the running softmax), rows (one row of logits),
matmul (one tile of logits), formulas (the losses, per token), tiles (block shapes). Commands: report (what the compiler
makes of the kernels), tune (the quickest tiles, which `tuned` reads where XLOSS_TILES asks for them).
"""
