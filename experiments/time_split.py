"""Where the time of a step goes on a GPU, from a profiler trace of real steps.

Kernels are sorted by the named scope that their instruction has in the compiled step
("attention", "select", "gather", "sample"; all else is dense), so the categories follow
the code and not the compiler's kernel names.
"""

from __future__ import annotations

import bisect
import re

import jax
import numpy as np

from pallas_kernels import default_impl
from pallas_kernels.device_trace import Kernel, load_kernels

_SCOPES = {
    "write_rows": "attention",
    "attention": "attention",
    "select": "selection",
    "gather": "gather",
    "sample": "sampling",
}
# Kernels that are no instruction of their own: libraries, copies, parts of a kernel.
_BY_NAME = (
    ("paged_attention", "attention"),
    ("select_tokens", "selection"),
    ("gather_kv", "gather"),
    ("write_rows", "attention"),
    ("memcpy", "copies"),
    ("memset", "copies"),
)
CATEGORIES = ("dense", "attention", "selection", "gather", "sampling", "copies")
_INSTRUCTION = re.compile(r"%?([\w.\-]+) = .*metadata=\{op_name=\"([^\"]*)\"")


def check_can_trace(option: str) -> None:
    """ValueError that names the option if a trace of this process holds no kernels."""
    if default_impl() != "gpu":
        raise ValueError(f"a trace needs a GPU, this process has none: give {option}")


def scopes_of(module_name: str, plan_size: int) -> dict[str, str]:
    """Scope path of each instruction of a live compiled step, by kernel name.

    The step is the module of that name whose arguments hold an int32 [plan_size].
    """
    scopes = {}
    for executable in jax.devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            if module.name != module_name:
                continue
            text = module.to_string()
            if f"s32[{plan_size}]" not in text.partition("\n")[0]:
                continue
            for name, path in _INSTRUCTION.findall(text):
                scopes[_kernel_name(name)] = path
    return scopes


def _kernel_name(instruction: str) -> str:
    return re.sub(r"[.\-]", "_", instruction)


def category(kernel_name: str, scopes: dict[str, str]) -> str:
    """One of CATEGORIES."""
    lowered = kernel_name.lower()
    for part, name in _BY_NAME:
        if part in lowered:
            return name
    for part in scopes.get(_kernel_name(kernel_name), "").split("/"):
        if part in _SCOPES:
            return _SCOPES[part]
    return "dense"


def split(kernels: list[Kernel], scopes: dict[str, str], num_steps: int) -> dict:
    """Milliseconds per step by category, the idle share, and kernels per step.

    Idle is the part of the time from the first kernel to the last one's end in which
    nothing runs; between steps, its num_steps - 1 longest gaps. Their median, 99th
    percentile and longest show whether all steps wait or few of them.
    """
    total = dict.fromkeys(CATEGORIES, 0.0)
    categories = {name: category(name, scopes) for name in {k.name for k in kernels}}
    busy, end, gaps = 0.0, kernels[0].start, []
    for kernel in kernels:
        total[categories[kernel.name]] += kernel.duration
        last = kernel.start + kernel.duration
        gaps.append(max(0.0, kernel.start - end))
        busy += max(0.0, last - max(end, kernel.start))
        end = max(end, last)
    between = sorted(gaps)[-(num_steps - 1) :] if num_steps > 1 else [0.0]
    window = end - kernels[0].start
    per_step = 1e-6 / num_steps
    return {
        "ms_per_step": {name: value * per_step for name, value in total.items()},
        "window_ms_per_step": window * per_step,
        "idle_ms_per_step": (window - busy) * per_step,
        "idle_share": (window - busy) / window,
        "idle_between_steps_share": sum(between) / window,
        "idle_between_steps_us": {
            f"p{q}": 1e-3 * float(np.percentile(between, q)) for q in (50, 99, 100)
        },
        "kernels_per_step": len(kernels) / num_steps,
        "num_steps": num_steps,
        "window_s": window * 1e-9,
    }


def split_of_steps(directory, plan_size: int, num_steps: int, count: int = 40) -> dict:
    """`split` and the `count` largest kernels of the newest trace under `directory`.

    The first step is left out: gaps of 1 to 2 ms in it are the profiler's start.

    plan_size: of the plans of the traced steps, see `scopes_of`.

    Raises:
        RuntimeError: no live compiled step takes such a plan.
        ValueError: as `load_kernels`.
    """
    kernels, num_steps = after_first_step(load_kernels(directory), num_steps)
    scopes = scopes_of("jit_step", plan_size)
    if not scopes:
        raise RuntimeError(
            "no live compiled step takes this plan, so kernels cannot be sorted by "
            "their scopes: run with --trace_steps 0 for rates alone"
        )
    return split(kernels, scopes, num_steps) | {
        "largest": largest(kernels, num_steps, count)
    }


def after_first_step(kernels: list[Kernel], num_steps: int) -> tuple[list, int]:
    """The kernels behind the first of `num_steps` steps of about as many kernels each.

    With the number of steps left; a single step is kept.
    """
    if num_steps == 1:
        return kernels, 1
    return kernels[round(len(kernels) / num_steps) :], num_steps - 1


def idle_ms(kernels: list[Kernel]) -> float:
    """Milliseconds, from the first to the last kernel, in which only copies run."""
    firsts, lasts = _busy_spans([k for k in kernels if not _is_copy(k)])
    return (lasts[-1] - firsts[0] - sum(lasts) + sum(firsts)) * 1e-6


def _is_copy(kernel):
    return re.match(r"mem(cpy|set)", kernel.name.lower()) is not None


def hidden_copy_share(kernels: list[Kernel], count: int = 16) -> dict:
    """Milliseconds of copies between host and device, and the share beside kernels.

    `longest`: the `count` longest ones, by their start in the trace.
    """
    copies = [k for k in kernels if re.match(r"memcpy(h2d|d2h)", k.name.lower())]
    others = [k for k in kernels if not _is_copy(k)]
    spans = _busy_spans(others)
    hidden = {copy: _overlap(copy, *spans) for copy in copies}
    total = sum(copy.duration for copy in copies)
    begin = min((k.start for k in kernels), default=0)
    longest = sorted(copies, key=lambda k: -k.duration)[:count]
    return {
        "copy_ms": total * 1e-6,
        "hidden_share": sum(hidden.values()) / total if total else float("nan"),
        "longest": [
            {
                "name": copy.name,
                "start_ms": (copy.start - begin) * 1e-6,
                "ms": copy.duration * 1e-6,
                "hidden_share": hidden[copy] / copy.duration,
            }
            for copy in sorted(longest, key=lambda k: k.start)
        ],
    }


def _overlap(copy, firsts, lasts):
    """Time of a copy inside the spans that start at `firsts` and end at `lasts`."""
    hidden, end = 0.0, copy.start + copy.duration
    place = bisect.bisect_right(lasts, copy.start)
    while place < len(firsts) and firsts[place] < end:
        hidden += min(end, lasts[place]) - max(copy.start, firsts[place])
        place += 1
    return hidden


def _busy_spans(kernels):
    """Starts and ends of the spans in which any of the kernels, by start, runs."""
    firsts, lasts = [], []
    for kernel in kernels:
        end = kernel.start + kernel.duration
        if lasts and kernel.start <= lasts[-1]:
            lasts[-1] = max(lasts[-1], end)
        else:
            firsts.append(kernel.start)
            lasts.append(end)
    return firsts, lasts


def largest(kernels: list[Kernel], num_steps: int, count: int = 40) -> list[dict]:
    """The kernels that take most time, with microseconds per step and runs per step."""
    totals = {}
    for kernel in kernels:
        runs, duration = totals.get(kernel.name, (0, 0.0))
        totals[kernel.name] = runs + 1, duration + kernel.duration
    ranked = sorted(totals.items(), key=lambda item: -item[1][1])[:count]
    return [
        {
            "name": name,
            "us_per_step": duration * 1e-3 / num_steps,
            "runs_per_step": runs / num_steps,
        }
        for name, (runs, duration) in ranked
    ]
