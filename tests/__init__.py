"""The test suite: run it with `pytest` from the root of the repository."""
