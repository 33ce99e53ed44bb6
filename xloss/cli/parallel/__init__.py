"""``xloss demo --parallel``: one training run on several numbers of processes, and the same curve from all."""
