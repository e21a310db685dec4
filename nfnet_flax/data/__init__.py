"""Deterministic input: the global batch of step N is a pure function of (seed, N)."""
