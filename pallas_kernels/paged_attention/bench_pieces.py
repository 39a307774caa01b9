"""Times attention that sums fixed pieces of keys, and compares its bits in company."""

import dataclasses
from collections.abc import Iterator

from pallas_kernels.cases import SMOLLM2, by_name
from pallas_kernels.paged_attention import bench as attention
from pallas_kernels.paged_attention.bits import BitsCase, compare
from pallas_kernels.paged_attention.cases import ATTENTION_CASES, AttentionCase
from pallas_kernels.timing import Rates

_PIECES = (256, 512, 1024, 2048)
_LENGTHS = (1, 9, 63, 64, 65, 255, 257, 511, 513, 1000, 2565, 4100, 8192, 12801, 30000)
_MODELS = {
    "qwen3_8b": {},
    "qwen2_5_1_5b": dict(num_heads=2, group_size=6),
    "smollm2_135m": SMOLLM2,
}


def _timed_cases() -> Iterator[AttentionCase]:
    """Yields every case cut anywhere, then in pieces: only its last group is."""
    for name in ("plain", "step"):
        for keys in (2560, 12800, 1500):
            case = by_name(ATTENTION_CASES, f"{name}_{keys}")
            yield case
            for piece in _PIECES:
                groups = (*case.groups[:-1], (*case.groups[-1], piece))
                new = dict(name=f"{case.name}_p{piece}", groups=groups)
                yield dataclasses.replace(case, **new)


def _bits_cases() -> Iterator[BitsCase]:
    for model, sizes in _MODELS.items():
        for piece in (256, 1024):
            name = f"bits_{model}_p{piece}"
            yield BitsCase(name=name, lengths=_LENGTHS, piece=piece, chunk=512, **sizes)


# `step_2560` is among those of `bench`, which times it first.
CASES = tuple(case for case in _timed_cases() if case.name != "step_2560")
CASES += tuple(_bits_cases())


def bench(
    case: AttentionCase | BitsCase, *, impl: str, rates: Rates, num_layers: int
) -> dict:
    """Returns time, rate and errors of a case, or what differs in bits.

    Errors of the two cuts are against each other.
    """
    if isinstance(case, BitsCase):
        options = dict(interpret=True) if impl == "gpu_interpret" else {}
        return compare(case, **options)
    free = dataclasses.replace(case, groups=tuple(g[:2] for g in case.groups))
    return attention.time_case(
        case, impl=impl, rates=rates, num_layers=num_layers, against=(free, impl)
    )
