"""Array types of the kernels: checked in tests; users neither need nor pay for them."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import kernel_inputs as ki
import pytest

from pallas_kernels.add_norm import add_norm
from pallas_kernels.add_norm.cases import NORM_CASES
from pallas_kernels.add_norm.gpu import add_norm_gpu
from pallas_kernels.cases import tagged
from pallas_kernels.common import load_implementation
from pallas_kernels.gather_kv import gather_kv
from pallas_kernels.gather_kv.cases import GATHER_CASES
from pallas_kernels.int8_matmul import int8_matmul
from pallas_kernels.int8_matmul.cases import INT8_CASES
from pallas_kernels.matmul import matmul
from pallas_kernels.matmul.cases import MATMUL_CASES
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.paged_attention.cases import ATTENTION_CASES
from pallas_kernels.rotate_heads import rotate_heads
from pallas_kernels.rotate_heads.cases import ROTATE_CASES
from pallas_kernels.select_tokens import select_tokens
from pallas_kernels.select_tokens.cases import SELECT_CASES
from pallas_kernels.write_rows import write_rows
from pallas_kernels.write_rows.cases import WRITE_CASES

OPERATIONS = {
    paged_attention: (ATTENTION_CASES, ki.attention_inputs),
    select_tokens: (SELECT_CASES, ki.select_inputs),
    gather_kv: (GATHER_CASES, ki.gather_inputs),
    write_rows: (WRITE_CASES, ki.write_inputs),
    rotate_heads: (ROTATE_CASES, ki.rotate_inputs),
    add_norm: (NORM_CASES, ki.norm_inputs),
    matmul: (MATMUL_CASES, ki.matmul_inputs),
    int8_matmul: (INT8_CASES, ki.int8_inputs),
}
operations = pytest.mark.parametrize(
    "operation", OPERATIONS, ids=lambda operation: operation.__name__
)


def refuses(function, args):
    """Returns whether a call is refused for the type of an array, before it runs."""
    try:
        jax.eval_shape(function, *args)
    except TypeError as error:
        assert type(error).__name__ == "TypeCheckError"
        return True
    return False


@operations
def test_an_axis_too_few_or_another_dtype_is_refused_at_every_border(operation):
    """A planted fault in each array alone, of the function and its implementations."""
    cases, make_inputs = OPERATIONS[operation]
    case = tagged(cases, "small")[0]
    # Optional arrays of the case stay away.
    inputs = tuple(x for x in make_inputs(case) if x is not None)
    options = dict(case.options)
    if operation in (rotate_heads, add_norm):
        options["eps"] = 1e-6
    package = f"pallas_kernels.{operation.__name__}"
    borders = [functools.partial(operation, impl="reference")]
    for impl in ("reference", "gpu", "tpu"):
        if operation is not gather_kv or impl != "gpu":  # which takes several layers
            borders.append(load_implementation(package, operation.__name__, impl))
    arrays = tuple(map(jnp.asarray, inputs))
    for border in borders:
        call = functools.partial(border, **options)
        if border is borders[0] or border is borders[1]:
            assert not refuses(call, arrays)
        for index, array in enumerate(arrays):
            for fault in (array[0], array.astype(jnp.float16)):
                faulty = (*arrays[:index], fault, *arrays[index + 1 :])
                assert refuses(call, faulty), (border, index, fault.shape, fault.dtype)


def test_a_letter_has_one_size_in_a_call():
    x, scale = jnp.zeros((2, 64)), jnp.zeros(64)
    assert not refuses(functools.partial(add_norm_gpu, eps=1e-6), (x, x, scale))
    # The kernel itself checks nothing: it would read past the end of these.
    for args in ((x, x[:, :32], scale), (x, x[:1], scale), (x, x, scale[:32])):
        assert refuses(functools.partial(add_norm_gpu, eps=1e-6), args)


def test_an_axis_of_all_heads_may_be_one():
    case = next(case for case in GATHER_CASES if case.name == "shared_rows")
    inputs = tuple(map(jnp.asarray, ki.gather_inputs(case)))
    gather = functools.partial(gather_kv, impl="reference")
    assert not refuses(gather, inputs)
    *others, indices, counts = inputs
    two = jnp.repeat(indices, 2, axis=1), jnp.repeat(counts, 2, axis=1)
    assert refuses(gather, (*others, *two))


def run_alone(code):
    """What a fresh interpreter prints; its errors where it fails."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    return result.stdout.split()


def test_users_need_no_checker_and_import_none():
    code = (
        "import sys; sys.modules['jaxtyping'] = sys.modules['beartype'] = None;"
        "import jax.numpy as jnp;"
        "from pallas_kernels.add_norm import add_norm;"
        "import sparsespec_jax.array_types;"
        "x, scale = jnp.ones((2, 64)), jnp.ones(64);"
        "print(add_norm(x, x, scale, eps=0.0, impl='reference')[0][0, 0])"
    )
    assert run_alone(code) == ["2.0"]


def test_users_are_not_checked():
    """Where jaxtyping is installed, it only spells: no function is wrapped."""
    code = (
        "import sys;"
        "from pallas_kernels.add_norm import api;"
        "print(hasattr(api.add_norm, '__wrapped__'), 'beartype' in sys.modules)"
    )
    assert run_alone(code) == ["False", "False"]


@pytest.mark.usefixtures("no_type_checks")
def test_without_a_checker_our_own_checks_refuse():
    with pytest.raises(ValueError, match="scale has shape"):
        add_norm(jnp.zeros((2, 64)), jnp.zeros((2, 64)), jnp.zeros(32), eps=0.0)
