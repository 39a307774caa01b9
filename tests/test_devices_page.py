"""The table on paper of docs/devices.md is what its formula gives.

`python -m tests.test_devices_page` prints it.
"""

import pathlib

import pytest

from sparsespec_jax.models.config import PRESETS
from sparsespec_jax.models.sharding import check_cut, shard_of

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "devices.md"
NAMES = "qwen3-32b", "llama-3.1-70b"
DEGREES = 1, 2, 4, 8, 16
ROWS, CONTEXT = 64, 8192  # requests of plain decoding, tokens of each
# Of an H100: bytes a second of memory (pallas_kernels/targets/h100.txtpb) and, as
# published, of NVLink in one direction; bytes of memory.
MEMORY, LINK, SIZE = 3352e9, 450e9, 80e9
LATENCY = 10e-6  # seconds of a sum, assumed


def row(name, degree):
    """A line of the table: what one of `degree` devices holds and does in a step."""
    config = PRESETS[name]
    own = shard_of(config, degree)
    weights = 2 * config.num_params / degree
    per_token = own.kv_bytes_per_token()
    kv = ROWS * CONTEXT * per_token
    num_sums = 2 * config.num_layers if degree > 1 else 0
    # Each device sends and receives this of a sum, in two passes over the devices.
    sent = num_sums * 2 * (degree - 1) / degree * ROWS * config.hidden_size * 2
    read, waited = (weights + kv) / MEMORY, num_sums * LATENCY + sent / LINK
    fits = "yes" if weights + kv < SIZE else "no"
    return (
        f"| {name} | {degree} | {weights / 1e9:.1f} | {per_token / 1024:.0f} | "
        f"{kv / 1e9:.1f} | {fits} | {sent / 1e6:.0f} | {read * 1e3:.1f} | "
        f"{waited * 1e3:.1f} | {waited / (read + waited):.0%} |"
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_what_the_formula_gives(name):
    lines = PAGE.read_text().splitlines()
    found = [line for line in lines if line.startswith(f"| {name} ")]
    for degree in DEGREES:
        check_cut(PRESETS[name], degree)
    assert found == [row(name, degree) for degree in DEGREES]


if __name__ == "__main__":
    print("\n".join(row(name, degree) for name in NAMES for degree in DEGREES))
