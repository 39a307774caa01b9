"""Bookkeeping of requests, slots, pages and outputs. No jax, nothing of the device."""
