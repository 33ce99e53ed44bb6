"""The ``xloss`` command line; one command a file."""

from xloss.cli.app import app, main

__all__ = ["app", "main"]
