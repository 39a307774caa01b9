"""Scripts in processes forked by one that has imported the package, and nothing else.

Importing takes a second, most of what a script that soon ends needs. No backend is up
when the parent forks and it has no thread of its own, so a child is a new process to
JAX; it ends as `python -c` does.
"""

import contextlib
import json
import pathlib
import subprocess
import sys
import tempfile

_PARENT = """
import json, os, runpy, sys, warnings
import jax, sparsespec_jax
from experiments import experiment, models

for line in sys.stdin:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy has threads, and heeds forks
        child = os.fork()
    if not child:
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    sys.exit()

code, sys.argv[1:], folder, *paths = json.loads(line)
for number, path in enumerate(paths, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
os.chdir(folder)
del line, child
exec(compile(code, "script", "exec"))
"""
_MODULE = "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


class Parent(contextlib.AbstractContextManager):
    """Forks scripts, one at a time, in an environment (this process's if None)."""

    def __init__(self, environment=None):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        command = [sys.executable, "-c", _PARENT]
        self._process = subprocess.Popen(command, env=environment, **pipes)

    def run(self, code, *arguments, cwd="."):
        """Run a script like `python -c`; a CompletedProcess with its text."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [pathlib.Path(folder) / name for name in ("out", "error")]
            script = [code, arguments, str(cwd), *map(str, paths)]
            print(json.dumps(script), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            texts = [path.read_text() for path in paths]
        return subprocess.CompletedProcess([code, *arguments], status, *texts)

    def run_module(self, name, *arguments):
        """Run a module like `python -m`, as `run` does."""
        return self.run(_MODULE, name, *arguments)

    def __exit__(self, *exc_info):
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait() == 0
