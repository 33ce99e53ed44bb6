"""``xloss verify``: every way to lay out one optimizer step, against one process."""

from xloss.cli.verify.command import verify

__all__ = ["verify"]
