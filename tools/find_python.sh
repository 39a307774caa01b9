#!/bin/sh
# Prints the path of a Python >= 3.12 that can make virtual environments.
# Each candidate is run, not just found: a version manager's shim may exist and fail.
usable() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' \
    >/dev/null 2>&1
}

for name in python3.13 python3.12 python3.14 python3 python; do
  path=$(command -v "$name" 2>/dev/null) || continue
  if usable "$path"; then echo "$path"; exit 0; fi
done
for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
  if usable "$path"; then echo "$path"; exit 0; fi
done
path=$(uv python find '>=3.12' 2>/dev/null) &&
  if usable "$path"; then echo "$path"; exit 0; fi

echo "error: no Python >= 3.12 with venv and ensurepip on PATH, under pyenv or known" \
  "to uv; install one (Debian: python3.12-venv) or run make with PYTHON=/path/to/python" >&2
exit 1
