"""Compiled programs kept on disk, so that a second process need not compile them.

JAX's own persistent cache does it: its keys hold the program, the versions, the flags
and the device, of a CPU its instruction set, so an entry never runs anywhere else.
"""

import functools
import logging
import os
import shutil
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import jax

from sparsespec_jax.loading.user_cache import user_cache_dir

VARIABLE = "SPARSESPEC_COMPILE_CACHE"  # "off", or a folder
_LEAST_FREE = 2**30  # bytes on the disk, else nothing is kept
_LARGEST = 4 * 2**30  # bytes of all entries

_log = logging.getLogger(__name__)


@functools.cache
def turn_on():
    """Let JAX keep compiled programs on disk; what others decided stays as it is.

    That is whoever set the folder of JAX's cache, disabled it, or said "off" in
    SPARSESPEC_COMPILE_CACHE. A folder named there is used, else `compiled` in the
    user's cache. One that cannot be used is logged, and programs are compiled as ever.
    """
    wanted = os.environ.get(VARIABLE)
    is_decided = jax.config.jax_compilation_cache_dir is not None
    if is_decided or not jax.config.jax_enable_compilation_cache or wanted == "off":
        return
    if not wanted and sys.platform != "linux":
        return  # not tried elsewhere
    folder = Path(wanted).expanduser() if wanted else user_cache_dir() / "compiled"
    if not is_usable(folder):
        return
    # A full disk, say, must not end a program that takes warnings for errors.
    message = "Error (reading|writing) persistent compilation cache entry"
    warnings.filterwarnings("default", message, UserWarning)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    _log.info("Compiled programs are kept in %s (%s=off: nowhere)", folder, VARIABLE)


def is_usable(folder):
    """True if entries can be kept in `folder`, which is made and tidied; else logs."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
        tidy(folder)
        problem = ""
        if shutil.disk_usage(folder).free < _LEAST_FREE:
            problem = f"less than {_LEAST_FREE >> 20} MB are free"
    except OSError as error:
        problem = str(error)
    if problem:
        _log.warning(
            "Compiled programs cannot be kept in %s (%s), so every process compiles "
            "its own: set %s to another folder or to off",
            folder,
            problem,
            VARIABLE,
        )
    return not problem


def tidy(folder, largest=_LARGEST):
    """Remove damaged entries, and the oldest ones until `largest` bytes are left.

    JAX writes in place, so a process that was killed, or a full disk, leaves half an
    entry, which would never be mended. Each entry is looked at once, if it is zlib's.
    """
    stamp = folder / "looked_at"
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    stamp.touch()
    entries = [(entry, entry.stat()) for entry in folder.glob("*-cache")]
    total = 0
    for entry, stat in sorted(entries, key=lambda item: -item[1].st_mtime):
        is_new = stat.st_mtime >= since
        total += stat.st_size
        if total > largest or (is_new and _is_damaged(entry)):
            entry.unlink(missing_ok=True)


def _is_damaged(entry):
    data = entry.read_bytes()
    if data and data[:1] != b"x":  # another format than zlib
        return False
    try:
        zlib.decompress(data)
    except zlib.error:
        return True
    return False
