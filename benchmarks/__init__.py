"""Measures xloss against bare GEMMs and its peers: ``python -m benchmarks``. Not part of the wheel."""
