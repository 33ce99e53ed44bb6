"""Pure per-token maths on ``[T]`` vectors: ratios, surrogates, KL penalties. No config, no masks, no head."""
