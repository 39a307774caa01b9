"""Claim: the experiment runs from end to end; no figure of it means anything.

Command: python -m experiments.generate --config smoke
Machine: any CPU with 2 cores; well under a minute.
Expected: all tokens identical.
"""

from experiments.config import GenerateConfig


def get_config() -> GenerateConfig:
    """Two short texts with small cycles."""
    return GenerateConfig(
        num_prompts=2,
        max_tokens=24,
        num_draft_tokens=3,
        min_budget=16,
        num_slots=2,
        prefill_chunk=32,
    )
