"""The formulas in float64 and nothing else. Imports torch only: it must be possible to find the product wrong.

Every function materialises the logits and lets plain autograd differentiate. Nothing here is fast, chunked or clever.
"""
