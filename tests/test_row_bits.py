"""The probe of rows: what depends on the number of rows is found."""

import jax
import numpy as np
import pytest

from experiments import row_bits


@pytest.mark.parametrize("form", ["batched", "dot", "separate"])
def test_rows_that_depend_on_their_number_are_found(form):
    kernel = jax.random.normal(jax.random.key(0), (12, 5))
    x = jax.random.normal(jax.random.key(1), (16, 12))

    def run(x, kernel, factor=1.0):
        parts = 1 if form == "dot" else 3
        return factor * row_bits.product(x, kernel, parts=parts, form=form)

    np.testing.assert_allclose(run(x, kernel).sum(0), x @ kernel, rtol=1e-5, atol=1e-5)
    tied = row_bits.product(x, kernel.T, parts=3, form=form, is_tied=True)
    np.testing.assert_allclose(tied.sum(0), x @ kernel, rtol=1e-5, atol=1e-5)

    def of_number(x, kernel):
        return run(x, kernel, 1.0 + len(x) * 2.0**-20)

    found = row_bits.bits_of(of_number, x, [kernel], [1, 8, 16])["differ"]
    assert found[8] == 0 and found[1] > 0 and found[16] > 0
