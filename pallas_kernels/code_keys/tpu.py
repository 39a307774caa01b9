"""Coding of keys for TPUs: the reference, whose scatter XLA does in place.

Few groups are coded in a step, and their words lie in tiles that a kernel would have to
read and write as a whole too.
"""

from pallas_kernels.array_types import Array, KeyCodes
from pallas_kernels.code_keys.reference import code_keys_reference
from pallas_kernels.score_select.codes import CodeLayout


def code_keys_tpu(
    *args: Array, layout: CodeLayout, most: int, interpret: bool
) -> KeyCodes:
    """Returns what `api.code_keys` documents; nothing in it needs interpretation."""
    del interpret
    return code_keys_reference(*args, layout=layout, most=most)
