"""Experiments: each writes one run directory; nothing imports this package."""
