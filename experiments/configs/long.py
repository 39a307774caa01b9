"""Claim: equality holds for thousands of tokens per request, past 1000 of context.

Command: python -m experiments.generate --config long --output_dir runs/long
Also with --temperature 0, --lag 0, --lag 2 and --page_size 64: none may change a token.
Machine: any CPU with 2 cores.
Expected: all of 8192 tokens identical. Text this long loops in a model this small, so
acceptance here says little: experiments of acceptance use short continuations.
"""

from experiments.config import GenerateConfig


def get_config() -> GenerateConfig:
    """Four requests of 2048 tokens each at the paper's k and budget ratio."""
    return GenerateConfig(max_tokens=2048, ignore_eos=True)
