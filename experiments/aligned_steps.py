"""Steps of aligned cycles, made of the engine's parts: all slots draft, or all verify.

The engine's own step mixes draft and verify lanes of different slots. Here a cycle is k
steps in which every slot drafts, then one in which every slot verifies, dispatched one
by one or as one program; drafts may use 8-bit weights. For measurements: no scheduler
plans such steps, and prompts cannot be read.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from experiments import int8_product
from pallas_kernels import int8_matmul
from pallas_kernels.add_norm import add_norm
from pallas_kernels.common import rms_norm
from pallas_kernels.rotate_heads import rotate_heads
from sparsespec_jax import Engine
from sparsespec_jax.config import SamplingParams
from sparsespec_jax.device import cascade
from sparsespec_jax.device import step as step_lib
from sparsespec_jax.device.attention import make_attend
from sparsespec_jax.device.context import StepContext, step_options
from sparsespec_jax.device.lanes import make_lanes
from sparsespec_jax.models import transformer as model
from sparsespec_jax.models.rope import rope_tables
from sparsespec_jax.plan.buffer import StepPlan, unpack
from sparsespec_jax.plan.shape import StepShape
from sparsespec_jax.plan.slot_params import slot_params
from sparsespec_jax.policies.base import Policy

DRAFT_WEIGHTS = ("bfloat16", "int8")
PRODUCTS = ("qkv", "out", "gate_up", "down", "lm_head")
_ROWS = 8  # products take multiples of them


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseShape(StepShape):
    """A StepShape that says how many slots draft and verify, instead of a cycle."""

    draft_lanes: int = 0
    verify_lanes: int = 0


@dataclasses.dataclass(frozen=True)
class CycleShape:
    """The steps of one program: `draft`, as often as `verify` has drafts, `verify`."""

    draft: PhaseShape
    verify: PhaseShape


class _SelectsNothing(Policy):
    """A policy for steps without a verification."""

    def is_anchor(self, layer_index):
        return False


def draft_shape(shape: StepShape) -> PhaseShape:
    """The step in which all slots of an engine's shape draft and none verifies."""
    return _phase(shape, draft_lanes=shape.num_slots)


def verify_shape(shape: StepShape, num_draft_tokens: int) -> PhaseShape:
    """The step in which all slots verify so many drafts.

    A verification fills draft caches only where there are draft lanes: some idle ones,
    which make the rows a multiple of 8, come first.
    """
    idle = _ROWS - shape.num_slots * (num_draft_tokens + 1) % _ROWS
    return _phase(
        shape.with_draft_tokens(num_draft_tokens),
        draft_lanes=idle,
        verify_lanes=shape.num_slots,
    )


def _phase(shape, **lanes):
    own = {f.name: getattr(shape, f.name) for f in dataclasses.fields(StepShape)}
    return PhaseShape(**own | lanes)


def plan_of(engine: Engine, shape) -> StepPlan:
    """Orders for a step of one of these shapes: every slot takes part."""
    if isinstance(shape, CycleShape):
        parts = [plan_of(engine, shape.draft), plan_of(engine, shape.verify)]
        buffer = np.concatenate([part.buffer for part in parts])
        return StepPlan(buffer, False, shape)
    plan = StepPlan.empty(shape, prefill=False)
    views, slots = plan.views, np.arange(shape.num_slots)
    law, limit = SamplingParams(ignore_eos=True), engine.max_length + 1
    views["slot_params"][:] = [
        slot_params(law, slot, limit, (), engine.speculation) for slot in slots
    ]
    if shape.verify_lanes:
        views["verify_slots"][:] = slots
    else:
        views["draft_slots"][:] = slots
    return plan


class AlignedEngine(Engine):
    """An Engine that also runs plans of these shapes; idle, without requests.

    quantised: the weights of 8-bit drafts, see `quantise`; products: how each of
    PRODUCTS is made with them.
    """

    def __init__(self, *args, quantised=None, products=None, **options):
        super().__init__(*args, **options)
        products = tuple(sorted(products.items())) if products else None
        # The steps must not hold the engine.
        self._weights = weights = [DRAFT_WEIGHTS[0]]
        plain = self.device_steps.step_function
        static = dict(
            config=self.model.config,
            policy=self.policy,
            options=step_options(self.speculation),
            impl=self.impl,
        )

        def step_function(filters, shape):
            if not isinstance(shape, PhaseShape | CycleShape):
                return plain(filters, shape)
            drafts_now = isinstance(shape, CycleShape) or not shape.verify_lanes
            is_int8 = drafts_now and weights[0] == "int8"
            drafts = (quantised, products) if is_int8 else (None, None)
            program = _program(shape, products=drafts[1], **static)

            def run(params, *args, prefill):
                return program((params, drafts[0]), *args, prefill=prefill)

            return run

        self.device_steps.step_function = step_function

    def draft_with(self, weights):
        """Draft with one of DRAFT_WEIGHTS from the next step on."""
        if weights not in DRAFT_WEIGHTS:
            raise ValueError(f"weights must be one of {DRAFT_WEIGHTS}, got {weights!r}")
        self._weights[0] = weights

    def set_num_drafted(self, count):
        """Say that every slot has drafted so many tokens in this cycle."""
        counts = jnp.full(self.shape.num_slots, count, jnp.int32)
        self.device_steps.replace_state(num_drafted=counts)


@functools.cache
def _program(shape, *, config, policy, options, impl, products):
    """The jitted step of a PhaseShape or CycleShape; params are (full, quantised)."""
    draft = functools.partial(
        _draft, config=config, policy=policy, options=options, impl=impl,
        products=products,
    )  # fmt: skip

    def verify_of(shape):
        made = step_lib.make_step(
            config, shape, policy=policy, options=options, filters=False, impl=impl
        )
        return made.__wrapped__

    def draft_step(params, state, buffer, *, prefill):
        return draft(params, state, buffer, shape=shape)

    def verify_step(params, state, buffer, *, prefill):
        return verify_of(shape)(params[0], state, buffer, prefill=prefill)

    def cycle(params, state, buffer, *, prefill):
        size = StepPlan.empty(shape.draft, prefill=False).buffer.size

        def one(_, state):
            return draft(params, state, buffer[:size], shape=shape.draft)[0]

        state = jax.lax.fori_loop(0, shape.verify.num_draft_tokens, one, state)
        return verify_of(shape.verify)(params[0], state, buffer[size:], prefill=prefill)

    if isinstance(shape, CycleShape):
        step = cycle
    else:
        step = verify_step if shape.verify_lanes else draft_step
    if products:
        step.__name__ += "_int8"  # traces tell programs by name
    return step_lib.jit_step(step, impl)


def _draft(params, state, buffer, *, shape, config, policy, options, impl, products):
    """The engine's step without its verification: (state, drafts per slot)."""
    plan = unpack(shape, buffer, prefill=False)
    context = StepContext(
        model=config, shape=shape, policy=_selects_nothing(policy), proposer=None,
        options=options, filters=False, impl=impl,
    )  # fmt: skip
    state = step_lib.update_tables(state, plan["table_updates"])
    lanes = make_lanes(context, state, plan)
    guesses = cascade.guess(context, state, lanes.draft)
    tokens, positions = step_lib.feed(context, state, lanes, guesses)
    attend, _ = make_attend(context, lanes)
    full, quantised = params
    args = tokens, positions, attend, state.layers
    if products is None:
        hidden, layers = model.forward(config, full, *args, impl=impl)
        scores = model.logits(config, full, hidden)
    else:
        scores, layers = int8_forward(
            config, full, quantised, *args, impl=impl, products=dict(products)
        )
    state = state._replace(layers=layers)
    with jax.named_scope("sample"):
        state = step_lib.store_drafts(context, state, lanes, guesses, scores)
    return state, state.num_drafted + 0  # the state's own is given away


def _selects_nothing(policy):
    fields = dataclasses.fields(Policy)
    return _SelectsNothing(**{f.name: getattr(policy, f.name) for f in fields})


def quantise(config, params, *, is_packed=False) -> dict:
    """8-bit forms of all products of a model, by layer and by name of PRODUCTS.

    is_packed: for the GPU kernel, see `int8_matmul.pack`.

    Raises:
      ValueError: the model has biases.
    """
    if config.attention_bias or config.attention_out_bias or config.mlp_bias:
        raise ValueError("8-bit drafts serve models without biases")

    @jax.jit
    def one(kernel):
        weight = int8_matmul.quantise(kernel)
        return int8_matmul.pack(weight, impl="gpu") if is_packed else weight

    made = {}
    for index in range(config.num_layers):
        layer = params[f"layer_{index}"]
        names = PRODUCTS[:-1]
        made[f"layer_{index}"] = {name: one(layer[name]["kernel"]) for name in names}
    if config.tie_embeddings:
        made["lm_head"] = one(params["embed"]["weight"].T)
    else:
        made["lm_head"] = one(params["lm_head"]["kernel"])
    return made


def int8_forward(
    config, params, quantised, tokens, positions, attend, caches, *, impl, products
):
    """Scores float32 [T, V] and new caches of tokens [T], by 8-bit products.

    As `model.forward` and `model.logits`; norms and embeddings are those of `params`.
    products: how each of PRODUCTS is made, see `int8_product.multiply`.
    """
    dtype, c = model.params_dtype(params), config

    def product(x, weights, name, dtype=dtype):
        return int8_product.multiply(x, weights[name], products[name], dtype)

    norm = functools.partial(add_norm, eps=c.norm_eps, impl=impl)
    cos, sin = jax.lax.optimization_barrier(rope_tables(positions, c))
    x, y, new_caches = params["embed"]["weight"][tokens], None, []
    for index, cache in enumerate(caches):
        layer, weights = params[f"layer_{index}"], quantised[f"layer_{index}"]
        scale = layer["input_norm"]["scale"]
        if y is None:
            wide = rms_norm(x.astype(jnp.float32), scale, c.norm_eps)
            normed = wide.astype(dtype)
        else:
            x, normed = norm(x, y, scale)
        qkv = product(normed, weights, "qkv")
        qkv = qkv.reshape(*qkv.shape[:-1], c.num_kv_heads, c.group_size + 2, c.head_dim)
        scales = [layer[n]["scale"] for n in ("q_norm", "k_norm") if c.qk_norm]
        q, rows = rotate_heads(
            qkv, cos, sin, *scales, eps=c.norm_eps, dtype=dtype, impl=impl
        )
        mixed, cache = attend(index, q, rows, cache)
        new_caches.append(cache)
        y = product(mixed.reshape(len(x), -1).astype(dtype), weights, "out")
        x, normed = norm(x, y, layer["mlp_norm"]["scale"])
        inner = product(normed, weights, "gate_up").reshape(len(x), 2, -1)
        y = product(nn.silu(inner[:, 0]) * inner[:, 1], weights, "down")
    _, hidden = norm(x, y, params["final_norm"]["scale"])
    return product(hidden, quantised, "lm_head", jnp.float32), tuple(new_caches)
