"""Sizes of an engine, checked against model, platform and memory before any work."""

import dataclasses
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import default_impl
from pallas_kernels.paged_attention import check_served as check_attention
from sparsespec_jax.config import EngineConfig, SpeculationConfig
from sparsespec_jax.device.state import pool_bytes_per_page
from sparsespec_jax.host import automatic
from sparsespec_jax.loading.load import Model
from sparsespec_jax.models.draft_weights import check_served, num_bytes
from sparsespec_jax.models.option_fields import MAX_INT
from sparsespec_jax.models.products import check_products
from sparsespec_jax.models.transformer import params_dtype
from sparsespec_jax.plan.buffer import plan_fields
from sparsespec_jax.plan.edits import edit_fields
from sparsespec_jax.plan.shape import (
    RESTORE_CHUNKS,
    StepShape,
    budget_tokens,
    pages_for,
)
from sparsespec_jax.policies.base import Policy
from sparsespec_jax.policies.select import resolve_policy
from sparsespec_jax.proposers.base import resolve_proposer

# Multiples of keys that the GPU kernels take without padding, and up to how many keys.
_GPU_MASS_KEYS = {32768: 2048, math.inf: 4096}
# Query rows of a lane that attention cuts over its keys; more are never cut.
_MOST_CUT_QUERIES = 64
_MEMORY_SHARE = 0.95  # of the free memory that the pool may take


class EngineSizes(NamedTuple):
    """What an engine is made of, in place of the options that leave it open."""

    speculation: SpeculationConfig  # without "auto"
    impl: str  # of the kernels
    policy: Policy
    proposer: Any  # None: the model itself
    max_length: int  # tokens of a request
    shape: StepShape
    kv_bytes_per_token: int
    num_host_chunks: int
    exact: bool  # numerics


def resolve(model, speculation, config):
    """EngineSizes of a SpeculationConfig and an EngineConfig; allocates nothing.

    Raises:
      ValueError: the options do not fit together, the model, the platform or the
        free memory.
    """
    speculation = settle(model, speculation, config)
    policy = resolve_policy(speculation.policy)
    check_cascade(speculation, policy)
    check_vocabulary(model.config, speculation)
    impl, max_length = resolve_impl(config.impl), resolve_max_length(model, config)
    shape = make_shape(speculation, config, max_length, impl)
    check_counts(shape)
    kv_dtype = params_dtype(model.params)
    if config.numerics == "exact":
        check_exact(model.config, shape, kv_dtype, impl)
    check_kernels(model.config, shape, kv_dtype, impl)
    per_token = pool_bytes_per_page(model.config, 1, kv_dtype)
    page_bytes = shape.page_size * per_token
    num_chunks = num_host_chunks(config, shape, page_bytes, max_length)
    staged = shape.restore_pages if num_chunks else 0
    drafts = 0
    if speculation.draft_weights:
        check_served(model.config, shape.num_draft_rows, kv_dtype, impl)
        drafts = num_bytes(model.config, model.params, impl=impl)
    check_memory(model.config, shape, kv_dtype, policy, staged, drafts)
    return EngineSizes(
        speculation=speculation,
        impl=impl,
        policy=policy,
        proposer=resolve_proposer(speculation.proposer),
        max_length=max_length,
        shape=shape,
        kv_bytes_per_token=per_token,
        num_host_chunks=num_chunks,
        exact=config.numerics == "exact",
    )


def settle(model, speculation, config):
    """The SpeculationConfig without "auto", see `automatic.settled`."""

    def fits(wanted):
        try:
            resolve(model, wanted, config)
        except ValueError:  # what is wrong without 8 bits too comes again
            return False
        return True

    return automatic.settled(
        speculation,
        impl=resolve_impl(config.impl),
        dtype=str(params_dtype(model.params)),
        fits=fits,
    )


def check_types(model, speculation, config):
    """ValueError unless these are a Model, a SpeculationConfig and an EngineConfig."""
    wanted = {
        "model": (model, Model, "load_model makes one"),
        "speculation": (speculation, SpeculationConfig, "or None for the defaults"),
        "engine": (config, EngineConfig, "or None for the defaults"),
    }
    for name, (value, kind, fix) in wanted.items():
        if not isinstance(value, kind):
            raise ValueError(
                f"{name} must be a {kind.__name__} ({fix}), got "
                f"{type(value).__name__} {str(value)[:40]!r}"
            )


def resolve_impl(impl):
    """The kernels to run; ValueError if this platform cannot run them."""
    available = default_impl()
    if impl in ("gpu", "tpu") and impl != available:
        raise ValueError(
            f"impl={impl!r} needs a {impl.upper()}, this process has "
            f"{jax.default_backend()!r}: use impl=None, 'reference' or "
            f"'{impl}_interpret'"
        )
    return impl or available


def resolve_max_length(model, config):
    """Tokens a request may have; ValueError past what the model was made for."""
    limit = model.config.max_length
    wanted = config.max_length or limit
    if wanted > limit:
        raise ValueError(
            f"max_length is {wanted}, the model {model.name} was made for {limit} "
            "tokens"
        )
    return wanted


def with_length(model, speculation, config, longest):
    """An EngineConfig with room for requests of `longest` tokens, and often a few more.

    Compiled steps depend on the room, so it has one of a few sizes: decoding other
    prompts then compiles nothing. Where that takes half of the free memory or more,
    the room is what is needed.
    """
    rounded = rounded_length(longest, model.config.max_length)
    needed = dataclasses.replace(config, max_length=longest)
    speculation = settle(model, speculation, needed)
    shape = make_shape(speculation, config, rounded, "reference")
    per_page = pool_bytes_per_page(
        model.config, shape.page_size, params_dtype(model.params)
    )
    policy = resolve_policy(speculation.policy)
    wanted = shape.num_pages * per_page + policy_bytes(model.config, shape, policy)
    is_small = wanted < free_memory_bytes() // 2
    return dataclasses.replace(config, max_length=rounded) if is_small else needed


def rounded_length(tokens, most):
    """The next of 256, 384, 512, 768, 1024 and so on, at most `most` tokens."""
    size = max(256, 1 << (tokens - 1).bit_length())
    return min(most, size if tokens > size * 3 // 4 or size == 256 else size * 3 // 4)


def check_kernels(model_config, shape, dtype, impl):
    """ValueError, naming the value, if the attention kernel cannot serve a model."""
    try:
        check_attention(
            dtype=dtype,
            head_size=model_config.head_dim,
            group_size=model_config.group_size,
            page_size=shape.page_size,
            impl=impl,
        )
    except NotImplementedError as error:
        raise ValueError(f"model and engine do not fit {impl!r}: {error}") from error


def check_exact(model_config, shape, dtype, impl):
    """ValueError, naming the part, where nothing makes rows exact."""
    fast = "use numerics='fast'"
    if not impl.startswith("gpu"):
        raise ValueError(
            f"numerics='exact' needs kernels for GPUs, this engine has {impl!r}: {fast}"
        )
    if dtype != jnp.bfloat16:
        raise ValueError(
            f"numerics='exact' is made for bfloat16 weights, these are {dtype}: {fast}"
        )
    if shape.prefill_chunk <= _MOST_CUT_QUERIES:
        raise ValueError(
            f"numerics='exact' needs prefill_chunk above {_MOST_CUT_QUERIES}, got "
            f"{shape.prefill_chunk}: raise it, or {fast}"
        )
    check_products(model_config)


def check_vocabulary(model_config, speculation):
    """ValueError if the ratio test is to keep more tokens than there are."""
    kept, vocab = speculation.draft_top_m, model_config.vocab_size
    if speculation.acceptor == "ratio_test" and kept > vocab:
        raise ValueError(
            f"draft_top_m is {kept}, the vocabulary has {vocab} tokens: lower it"
        )


def check_cascade(speculation, policy):
    """ValueError if a cascade is to check guesses with a selection of every step."""
    if speculation.is_cascade and policy.per_step:
        raise ValueError(
            f"policy {policy.name!r} selects for one query of a draft step, "
            f"proposer='cascade' feeds {1 + speculation.cascade_sizes[1]}: choose a "
            "policy that selects once per verification"
        )


def make_shape(speculation, config, max_length, impl):
    """StepShape of an engine; pages for all slots at full length unless given."""
    page_size, drafts = config.page_size, speculation.num_draft_tokens
    cap = largest_budget(speculation, max_length)
    table = pages_for(max_length + drafts, page_size)
    at_once = speculation.proposer != "self" and not speculation.is_cascade
    draft_steps, num_guesses = speculation.cascade_sizes
    copies = drafts and not at_once
    draft_table = pages_for(cap + 2 * drafts + 1, page_size) if copies else 0
    if impl.startswith("gpu"):
        # Columns of a table cost nothing, masses that need padding do.
        for most, multiple in _GPU_MASS_KEYS.items():
            block = math.lcm(multiple, page_size) // page_size
            table_width = -(-max(table, draft_table) // block) * block
            if table_width * page_size <= most:
                break
    else:
        table_width = table
    return StepShape(
        num_slots=config.num_slots,
        num_draft_tokens=drafts,
        num_pages=config.num_pages or config.num_slots * (table + draft_table),
        page_size=page_size,
        table_width=table_width,
        draft_table_width=max(draft_table, 1),
        max_budget=max(cap, 1),
        prefill_lanes=config.prefill_lanes,
        prefill_chunk=config.prefill_chunk,
        drafts_at_once=at_once,
        draft_steps=draft_steps,
        num_guesses=num_guesses,
        is_aligned=speculation.schedule == "aligned",
        restore_pages=RESTORE_CHUNKS * config.host_chunk_pages,
    )


def num_host_chunks(config, shape, page_bytes, max_length):
    """Chunks of pages to take in host memory.

    By default as many as the slots can lack, within a quarter of the machine's memory.

    Raises:
      ValueError: the pages asked for exceed the machine's memory.
    """
    if config.kv_policy != "offload":
        return 0
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if config.host_pages is not None:
        fit = int(_MEMORY_SHARE * memory) // page_bytes
        if config.host_pages > fit:
            raise ValueError(
                f"host_pages is {config.host_pages}, at most {fit} pages of "
                f"{page_bytes} bytes fit into host memory"
            )
        return -(-config.host_pages // config.host_chunk_pages)
    rows = shape.num_slots * (max_length + shape.num_draft_tokens)
    lacking = pages_for(rows, shape.page_size) - shape.num_pages
    if config.num_pages is None or lacking <= 0:
        return 0
    # Each slot may leave one chunk partly filled.
    wanted = lacking // config.host_chunk_pages + shape.num_slots
    return min(wanted, memory // 4 // (page_bytes * config.host_chunk_pages))


def largest_budget(speculation, max_length):
    """Tokens selected at the longest context."""
    budget = budget_tokens(
        max_length,
        ratio=speculation.budget_ratio,
        floor=speculation.min_budget,
        cap=max_length,
    )
    return int(budget)


def floor_of_drafts(speculation, shape):
    """Tokens that a draft reads at least, 0 where drafts read no selection."""
    policy = getattr(speculation.policy, "name", speculation.policy)
    has_selection = shape.draft_lanes and policy != "full"
    return speculation.min_budget if has_selection else 0


def check_budget(speculation, max_length, shape):
    """ValueError if this budget could exceed what a StepShape was made for."""
    largest = largest_budget(speculation, max_length)
    if largest > shape.max_budget:
        raise ValueError(
            f"budget_ratio={speculation.budget_ratio} and "
            f"min_budget={speculation.min_budget} can select {largest} tokens, the "
            f"engine was built for {shape.max_budget}"
        )


def check_counts(shape):
    """ValueError if a step would count what does not fit into int32."""
    step_tokens = shape.num_draft_rows + shape.verify_lanes * shape.num_queries
    step_tokens += shape.prefill_lanes * shape.prefill_chunk
    plan = sum(math.prod(field) for field in plan_fields(shape, prefill=True).values())
    counts = {
        "tokens of a request": (
            shape.table_width * shape.page_size,
            "max_length or page_size",
        ),
        "tokens in a step": (
            step_tokens,
            "prefill_lanes, prefill_chunk or num_slots",
        ),
        "integers in the plan of a step": (
            plan,
            "host_chunk_pages, prefill_lanes, prefill_chunk or num_slots",
        ),
    }
    for what, (count, options) in counts.items():
        if count > MAX_INT:
            raise ValueError(
                f"the options make up to {count} {what}, at most {MAX_INT} can be "
                f"counted: lower {options}"
            )


def check_memory(model_config, shape, kv_dtype, policy, num_staged, draft_bytes=0):
    """ValueError, with the pages that would fit, if the pool exceeds free memory.

    What the policy remembers comes first: it is allocated beside the pool, as are
    `num_staged` pages on their way from and to host memory, and `draft_bytes` of
    weights for drafts.
    """
    per_page = pool_bytes_per_page(model_config, shape.page_size, kv_dtype)
    remembered = policy_bytes(model_config, shape, policy)
    free = int(_MEMORY_SHARE * free_memory_bytes()) - remembered - draft_bytes
    # Rows of a pool are numbered in int32.
    most = MAX_INT // (shape.page_size * model_config.num_kv_heads)
    fit = max(0, min(free // per_page - num_staged, most))
    if shape.num_pages > fit:
        raise ValueError(
            f"{shape.num_pages} KV pages of {per_page} bytes need "
            f"{shape.num_pages * per_page / 2**30:.1f} GiB, at most {fit} pages fit"
            + (f" beside {remembered} bytes of policy state" if remembered else "")
            + (f" beside {draft_bytes} bytes of draft weights" if draft_bytes else "")
            + ": lower num_slots, max_length or page_size, or set num_pages"
        )


def check_edits(model, shape, used, wanted):
    """ValueError if free memory lacks room for the arrays of larger StepExtras."""
    vocab = model.config.vocab_size
    before, after = (
        sum(
            math.prod(size) * np.dtype(dtype).itemsize
            for size, dtype, _ in edit_fields(asked, vocab).values()
        )
        if asked.edits
        else 0
        for asked in (used, wanted)
    )
    if before == after:
        return
    # The smaller arrays live until the larger ones are filled.
    needed, free = shape.num_slots * after, free_memory_bytes()
    if needed > free:
        raise ValueError(
            f"penalties, biases and bad words need {needed} bytes for "
            f"{shape.num_slots} slots of {vocab} tokens, {free} are free beside the KV "
            "pages: lower num_pages or num_slots"
        )


def policy_bytes(model_config, shape, policy):
    """Bytes of what a policy remembers, of all slots and layers."""
    if not (policy.state_shape and shape.draft_lanes):
        return 0
    state = policy.state_shape(
        model_config.num_kv_heads, shape.table_width * shape.page_size
    )
    return 4 * math.prod(state) * shape.num_slots * model_config.num_layers


def free_memory_bytes():
    """Memory of the first device that nothing holds; on a CPU, all of the machine's."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def of_drafts(model, speculation, impl):
    """What DecodeStats says of drafts: their schedule, weights and bytes."""
    kind = speculation.draft_weights
    read = num_bytes(model.config, model.params, impl=impl) if kind else None
    names = "schedule", "draft_weights", "draft_weight_bytes"
    return dict(zip(names, (speculation.schedule, kind, read), strict=True))


def weight_bytes(model):
    """Weights that one step reads; of an untied embedding it gathers rows only."""
    total = sum(x.nbytes for x in jax.tree.leaves(model.params))
    if model.config.tie_embeddings:
        return total
    return total - model.params["embed"]["weight"].nbytes
