"""The whole step compiled for an H100 and a TPU, without either.

What would cost speed silently is bounded: copies of the pool (temporary memory, state
that is not updated in place) and launches per layer on the GPU.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import step_clock
from pallas_kernels.aot import compile_for, target_devices
from pallas_kernels.matmul import matmul
from sparsespec_jax import EngineConfig, SpeculationConfig, sizes
from sparsespec_jax.device import step as step_lib
from sparsespec_jax.device.context import step_options
from sparsespec_jax.device.sharding import state_specs
from sparsespec_jax.device.state import new_state
from sparsespec_jax.models import layer
from sparsespec_jax.models.collectives import MODEL_AXIS
from sparsespec_jax.models.config import PRESETS
from sparsespec_jax.models.draft_weights import with_draft_weights
from sparsespec_jax.models.sharding import (
    param_specs,
    shardings,
    with_heads_for,
)
from sparsespec_jax.models.transformer import param_shapes
from sparsespec_jax.plan.buffer import StepPlan
from sparsespec_jax.policies.select import resolve_policy
from sparsespec_jax.proposers.base import resolve_proposer

pytestmark = pytest.mark.usefixtures("optimized_programs")

_RESULTS = re.compile(r"[a-z0-9]+\[([\d,]*)\]")
_LAYERS = 3
INT8 = (("schedule", "aligned"), ("draft_weights", "int8"))
_CHUNKS_CLOCKED = dict(prefill=(2, 512), wrap=step_clock.with_clock, num_pages=1000)
# The step whose pool and weights fill a GPU.
_FILLING, _FULL = ("h100", 7, "self"), dict(num_pages=50_000)
_NO_LAUNCH = ("parameter", "get-tuple-element", "bitcast", "constant", "tuple")
_INSTRUCTION = re.compile(
    r"^ +(?:ROOT )?%?[\w.\-]+ = .*? ([a-z\-]+)\(.*op_name=\"(.*?)\""
)


@functools.cache
def compile_step(
    target,
    num_draft_tokens,
    policy="pillar",
    proposer="self",
    prefill=None,
    wrap=lambda step: step,
    num_layers=_LAYERS,
    exact=False,
    drafts=(),
    degree=1,
    **engine,
):
    """The step of a small model for `target`, and the bytes of one layer's pool.

    `prefill` are the lanes and the tokens of the prompt chunks that the step reads;
    `wrap` makes another function of the step; `degree` devices share the model, the
    bytes are those of one.
    """
    impl, mesh = "gpu" if target == "h100" else "tpu", None
    if degree > 1:
        mesh = jax.sharding.Mesh(target_devices(target, degree), (MODEL_AXIS,))
    model = dataclasses.replace(
        PRESETS["qwen3-1.7b"], num_layers=num_layers, vocab_size=1024
    )
    speculation = SpeculationConfig(
        num_draft_tokens=num_draft_tokens,
        policy=policy,
        proposer=proposer,
        **dict(drafts),
    )
    config = EngineConfig(num_slots=16, page_size=128, max_length=2000, **engine)
    if prefill:
        lanes, chunk = prefill
        config = dataclasses.replace(config, prefill_lanes=lanes, prefill_chunk=chunk)
    shape = sizes.make_shape(speculation, config, config.max_length, impl)
    policy = resolve_policy(speculation.policy)
    step = step_lib.make_step(
        model,
        shape,
        policy=policy,
        proposer=resolve_proposer(proposer),
        options=step_options(speculation),
        filters=False,
        impl=impl,
        exact=exact,
        mesh=mesh,
    )
    state = jax.eval_shape(
        functools.partial(
            new_state,
            with_heads_for(model, degree),
            shape,
            kv_dtype=jnp.bfloat16,
            draft_top_m=0,
            policy=policy,
        )
    )
    params = jax.eval_shape(
        functools.partial(
            with_draft_weights,
            model,
            kind=speculation.draft_weights,
            impl=impl,
            mesh=mesh,
        ),
        param_shapes(with_heads_for(model, degree), jnp.bfloat16),
    )
    if mesh is not None:
        params = placed(params, param_specs(params), mesh)
        state = placed(state, state_specs(state, policy, mesh), mesh)
    buffer = StepPlan.empty(shape, prefill=bool(prefill)).buffer
    compiled = compile_for(
        target,
        functools.partial(wrap(step.__wrapped__), prefill=bool(prefill)),
        params,
        state,
        placed(buffer, jax.sharding.PartitionSpec(), mesh),
        compiler_options=step_lib.step_compiler_options(impl, exact=exact) or None,
        donate_argnums=1,
    )
    return compiled, state.layers[0].kv_pages.size * 2 // degree


def placed(arrays, specs, mesh):
    """Descriptions of arrays that are cut over a mesh, if there is one."""
    places = jax.tree.map(lambda _: None, arrays)
    if mesh is not None:
        places = shardings(mesh, specs)
    return jax.tree.map(
        lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        arrays,
        places,
    )


def launches_of(compiled):
    """(operation, scope path) of every launch of a compiled step, in its order."""
    entry = compiled.compiled.as_text().partition("\nENTRY ")[2]
    found = [_INSTRUCTION.match(line) for line in entry.splitlines()]
    return [m.groups() for m in found if m and m[1] not in _NO_LAUNCH]


@pytest.mark.parametrize(
    ("target", "num_draft_tokens", "proposer", "most_launches"),
    [
        ("h100", 7, "self", 11),
        ("h100", 0, "self", 11),
        pytest.param("h100", 7, "cascade", 11, marks=pytest.mark.slow),
        ("v5e", 8, "self", None),
        pytest.param("v5e", 8, "cascade", None, marks=pytest.mark.slow),
    ],
)
def test_a_step_compiles_in_place(target, num_draft_tokens, proposer, most_launches):
    pytest.importorskip("jax_cuda13_plugin" if target == "h100" else "libtpu")
    num_layers = _LAYERS if most_launches else 2  # a middle layer's are counted
    how = _FULL if (target, num_draft_tokens, proposer) == _FILLING else {}
    compiled, pool_bytes = compile_step(
        target, num_draft_tokens, proposer=proposer, num_layers=num_layers, **how
    )
    assert compiled.temp_bytes < min(pool_bytes / 8, 20e6)
    assert compiled.alias_bytes >= num_layers * pool_bytes
    if most_launches is None:
        return
    paths = [path for _, path in launches_of(compiled)]
    layers = [[p for p in paths if f"/layer_{i}/" in p] for i in range(_LAYERS)]
    # What layers share bears the name of one of them; the first adds no stream.
    of_layer = min(layers[1:], key=len)
    assert 8 <= len(of_layer) <= most_launches
    # Queries and rows are packed where they are made, and angles evaluated once.
    assert not [path for path in of_layer if re.search("concatenate|cos|sin", path)]
    kernels = {"rotate_heads": 1, "add_norm": 2, "write_rows": 1}
    for name, count in kernels.items():
        assert sum(f"({name}_gpu)" in path for path in of_layer) == count


@pytest.mark.parametrize(
    "policy", ["index", pytest.param("index_2bit", marks=pytest.mark.slow)]
)
def test_an_index_adds_three_launches_and_no_copies(policy):
    """Scoring and selecting are one; the others copy the picks and code new keys."""
    pytest.importorskip("jax_cuda13_plugin")
    compiled, pool_bytes = compile_step("h100", 7, policy=policy)
    assert compiled.temp_bytes < min(pool_bytes / 8, 20e6)
    bits = {"index": 4, "index_2bit": 2}[policy]
    largest = {4: 128, 2: 64}[bits]
    groups = 128 // largest
    row = 4 * 128 * (1 + largest * bits // 32)  # of a group and head of 128 channels
    index_bytes = pool_bytes // (128 * 256 * 2) * groups * row
    assert compiled.alias_bytes >= _LAYERS * (pool_bytes + index_bytes)
    paths = [path for _, path in launches_of(compiled)]
    layers = [[p for p in paths if f"/layer_{i}/" in p] for i in range(_LAYERS)]
    of_layer = min(layers[1:], key=len)
    assert len(of_layer) <= 11 + 3
    for name in ("score_select", "gather_kv", "code_keys", "write_rows"):
        assert sum(f"({name}_gpu)" in path for path in of_layer) == 1


def test_prompt_chunks_are_attended_in_a_launch_of_their_own_without_copies():
    pytest.importorskip("jax_cuda13_plugin")
    compiled, _ = compile_step("h100", 8, **_CHUNKS_CLOCKED)
    launches = launches_of(compiled)
    of_attention = [name for name, path in launches if "/layer_1/attention/" in path]
    assert of_attention == ["custom-call"] * 3


def test_a_step_reads_the_clock_before_and_behind_all_else():
    pytest.importorskip("jax_cuda13_plugin")
    compiled, pool_bytes = compile_step("h100", 8, **_CHUNKS_CLOCKED)
    assert compiled.temp_bytes < pool_bytes / 8
    assert compiled.alias_bytes >= _LAYERS * pool_bytes
    paths = [path for _, path in launches_of(compiled)]
    first, last = [i for i, path in enumerate(paths) if "read_clock" in path]
    kernels = [i for i, path in enumerate(paths) if "_gpu)" in path]
    assert first < kernels[0] and kernels[-1] < last


def test_a_pool_that_fills_the_gpu_adds_no_launches():
    """Those of a layer are counted in `test_a_step_compiles_in_place`."""
    pytest.importorskip("jax_cuda13_plugin")
    target, k, proposer = _FILLING
    compiled, pool_bytes = compile_step(
        target, k, proposer=proposer, num_layers=_LAYERS, **_FULL
    )
    assert 70e9 < _LAYERS * pool_bytes < 85e9
    text = compiled.compiled.as_text()
    assert not re.search(r"^ +(?:ROOT )?%?\S*remat\S* = ", text, re.MULTILINE)


@pytest.mark.parametrize("max_length", [40, 1000, 5000, 32000, 33000, 40000])
def test_masses_on_a_gpu_need_no_padding(max_length):
    config = EngineConfig(num_slots=2, page_size=16)
    shape = sizes.make_shape(SpeculationConfig(), config, max_length, "gpu")
    width = max(shape.table_width, shape.draft_table_width)
    assert width * 16 % (2048 if width * 16 <= 32768 else 4096) == 0
    assert shape.table_width * 16 >= max_length + 8


def test_masses_and_index_lists_of_several_layers_are_not_copied():
    pytest.importorskip("jax_cuda13_plugin")
    target, k, proposer = _FILLING
    compiled, _ = compile_step(
        target, k, proposer=proposer, num_layers=_LAYERS, **_FULL
    )
    entry = compiled.compiled.as_text().partition("\nENTRY ")[2]
    lists = 2 * 8 * 192  # verify lanes, KV heads, rows of the smallest budget
    launches = []
    for line in entry.splitlines():
        match = _INSTRUCTION.match(line)
        if not match or not re.search("/(select|gather)/", match[2]):
            continue
        launches.append(match[1])
        if match[1] in ("fusion", "copy", "concatenate"):
            results = line.partition(" = ")[2].partition(f" {match[1]}(")[0]
            sizes = [
                math.prod(int(x) for x in shape.split(",") if x)
                for shape in _RESULTS.findall(results)
            ]
            assert max(sizes) < lists, line
    assert launches.count("custom-call") == 2  # all layers in one of each kind


def test_exact_prompt_rows_have_products_of_their_own():
    """More launches, one reading of gate and up, no more bytes than fast steps need."""
    pytest.importorskip("jax_cuda13_plugin")
    compiled, pool_bytes = compile_step(
        "h100", 7, exact=True, prefill=(2, 512), num_pages=1000
    )
    assert compiled.alias_bytes >= _LAYERS * pool_bytes
    paths = [path for _, path in launches_of(compiled) if "/layer_1/" in path]
    counts = {"(matmul_gpu)": 4, "/dot_general": 3, "(add_norm_gpu)": 4}
    counts |= {"(rotate_heads_gpu)": 2, "(write_rows_gpu)": 1, "concatenate": 3}
    for name, count in counts.items():
        assert sum(name in path for path in paths) == count, name
    assert len(paths) <= 22
    # Parts of 1,024 prompt rows would be 64 MB.
    assert compiled.temp_bytes < 50e6


@pytest.mark.parametrize(("alignment", "is_handed_on"), [(256, False), (1, True)])
def test_kernels_are_handed_no_slice_that_lies_askew(
    alignment, is_handed_on, monkeypatch
):
    """XLA hands on the place of a slice; a Hopper kernel refuses 13 x 1,152 bytes."""
    pytest.importorskip("jax_cuda13_plugin")
    monkeypatch.setattr(layer, "_ALIGNMENT", alignment)
    groups = [
        layer.RowGroup(np.empty((rows, 576)), None, None, None, False)
        for rows in (13, 128)
    ]

    def product_of_the_last(rows, weight):
        return matmul(layer._split(rows, groups)[1], weight, impl="gpu")

    shapes = [jax.ShapeDtypeStruct((n, 576), jnp.bfloat16) for n in (141, 576)]
    text = compile_for("h100", product_of_the_last, *shapes).compiled.as_text()
    assert ("dynamic-slice-fusion" in text) == is_handed_on


@pytest.mark.parametrize(
    ("target", "k"), [("h100", 7), pytest.param("v5e", 8, marks=pytest.mark.slow)]
)
def test_a_cycle_compiles_in_place(target, k):
    """Drafts run in a loop: a pool that is no place of it would be copied by each."""
    pytest.importorskip("jax_cuda13_plugin" if target == "h100" else "libtpu")
    compiled, pool_bytes = compile_step(
        target, k, drafts=INT8, num_layers=1, num_pages=10_000
    )
    assert compiled.temp_bytes < pool_bytes / 8
    assert compiled.alias_bytes >= pool_bytes
    text = compiled.compiled.as_text()
    assert " while(" in text
    if target == "h100":  # each product of a layer and the vocabulary's, once
        assert len(re.findall(r"custom-call\(.*jit\(int8_matmul_gpu\)", text)) == 5


_COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


@pytest.mark.parametrize(
    ("target", "degree"),
    [
        ("h100", 2),
        ("v5e", 8),
        *(
            pytest.param(target, degree, marks=pytest.mark.slow)
            for target, degree in (("h100", 8), ("v5p", 4), ("v5p", 8), ("v6e", 8))
        ),
    ],
)
def test_a_shared_step_compiles_in_place_and_gathers_nothing_whole(target, degree):
    pytest.importorskip("jax_cuda13_plugin" if target == "h100" else "libtpu")
    compiled, pool_bytes = compile_step(
        target, 7, num_layers=1, degree=degree, num_pages=4000
    )
    assert compiled.temp_bytes < min(pool_bytes / 8, 20e6)
    assert compiled.alias_bytes >= pool_bytes
    found = _COLLECTIVE.findall(compiled.compiled.as_text())
    sums = [result for result, name in found if name == "all-reduce"]
    # Behind the embedding, the output and down; a maximum for log-probabilities. A TPU
    # makes gathers of few numbers by sums.
    assert 4 <= len(sums) <= (4 if target == "h100" else 8)
    rows, hidden = 32, 2048  # of two verifications of 8 rows and 16 drafts
    for result, name in found:
        sizes = [
            math.prod(int(x) for x in shape.split(",") if x)
            for shape in _RESULTS.findall(result)
        ]
        assert name in ("all-reduce", "all-gather")
        assert max(sizes) <= (
            rows * hidden if name == "all-reduce" else 4 * degree * rows
        )


@pytest.mark.slow
def test_a_shared_cycle_with_drafts_in_8_bits_compiles_in_place():
    pytest.importorskip("jax_cuda13_plugin")
    compiled, pool_bytes = compile_step(
        "h100", 7, num_layers=1, degree=2, num_pages=4000, drafts=INT8
    )
    assert compiled.temp_bytes < pool_bytes / 8
    assert compiled.alias_bytes >= pool_bytes


@pytest.mark.slow
def test_exact_sums_of_devices_have_an_order():
    """What devices add is gathered and added one by one, but for rows that one has."""
    pytest.importorskip("jax_cuda13_plugin")
    compiled, _ = compile_step(
        "h100", 7, num_layers=1, degree=2, num_pages=4000, exact=True
    )
    found = _COLLECTIVE.findall(compiled.compiled.as_text())
    sums = [result for result, name in found if name == "all-reduce"]
    assert len(sums) == 2  # the embedding's, and a maximum
    gathers = "".join(result for result, name in found if name == "all-gather")
    assert gathers.count("f32[2,32,2048]") == 2  # behind output and down
