"""Claim: sampled text is token for token that of plain decoding.

Command: make demo
Machine: any CPU with 2 cores and 4 GB of memory.
Expected: all of more than 1000 tokens identical.
"""

from experiments.config import GenerateConfig


def get_config() -> GenerateConfig:
    """The defaults."""
    return GenerateConfig()
