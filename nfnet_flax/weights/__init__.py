"""Weights in the formats that people hold them in."""
