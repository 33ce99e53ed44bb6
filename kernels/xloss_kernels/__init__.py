"""Triton kernels of xloss: a leaf that imports torch and triton and nothing of xloss.

Importing this package imports no kernel: each operation is a module of its own, which ``xloss.head.fused`` takes in at
its first use.
"""
