"""The repository's own rules: imports, sizes, packaging, README and configs."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

from experiments import config as experiment_config
from experiments import front_page
from experiments.options import RunOptions
from sparsespec_jax.host.request import Request

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = ("pallas_kernels", "sparsespec_jax", "experiments")  # each imports the left
# The rooms of sparsespec_jax, a folder or a file each: each imports only from those
# above it. Host and device know nothing of each other.
ROOMS = (
    ("array_types",),
    ("models",),
    ("config",),
    ("plan",),
    ("sampling",),
    ("policies", "proposers"),
    ("host", "device", "loading"),
    ("sizes",),
    ("tuning",),
    ("device_steps",),
    ("engine",),
    ("decode",),
    ("__init__",),
)
MAX_ENTRIES = 16  # of the package's top level
# Importable, testable and fast without jax.
NO_JAX = (
    "config",
    "plan.shape",
    "plan.slot_params",
    "plan.buffer",
    "plan.outcome",
    "plan.edits",
    "models.fields",
    "models.option_fields",
)
MAX_LINES = 440  # the rule is about 400
# A kernel body and the call that places it stay together.
LONGER = {"gpu.py": 600, "tpu.py": 600}


def source_files(*folders):
    files = [p for f in folders for p in sorted((ROOT / f).rglob("*.py"))]
    assert files
    return files


def imported_modules(path):
    """Full names of the modules that a file imports, at any depth of nesting."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", source_files(*PACKAGES), ids=relative)
def test_packages_import_only_those_below(path):
    own = path.relative_to(ROOT).parts[0]
    roots = {name.partition(".")[0] for name in imported_modules(path)}
    above = set(PACKAGES[PACKAGES.index(own) + 1 :]) | {"tests"}
    assert not roots & above
    if own == "pallas_kernels":
        allowed = {"jax", "jaxlib", "numpy", "absl"} | set(sys.stdlib_module_names)
        if path.name == "array_types.py":
            allowed |= {"jaxtyping"}  # if it is installed
        assert roots - {own} <= allowed


def room_of(path):
    """The folder or file of the package's top level that a file belongs to."""
    first = path.relative_to(ROOT / "sparsespec_jax").parts[0]
    return first.removesuffix(".py")


def rooms_entered(path, names):
    """Rooms other than its own that a file with these imported modules enters."""
    rooms = set()
    for name in names:
        parts = name.split(".")
        if parts[0] == "sparsespec_jax" and len(parts) > 1:
            is_room = any(parts[1] in level for level in ROOMS)
            rooms.add(parts[1] if is_room else "__init__")
    return rooms - {room_of(path)}


def rooms_forbidden(path, names):
    """Of the rooms that a file enters, those on its own level or below it."""
    own = next(i for i, level in enumerate(ROOMS) if room_of(path) in level)
    allowed = {room for level in ROOMS[:own] for room in level}
    return rooms_entered(path, names) - allowed


@pytest.mark.parametrize("path", source_files("sparsespec_jax"), ids=relative)
def test_rooms_import_only_those_above(path):
    """So there is no circle, and host and device never import each other."""
    assert not rooms_forbidden(path, imported_modules(path))


def test_every_room_is_listed_and_there_are_few():
    entries = {
        path.stem
        for path in (ROOT / "sparsespec_jax").iterdir()
        if path.name != "__pycache__"
    }
    assert entries == {room for level in ROOMS for room in level}
    assert len(entries) <= MAX_ENTRIES


def test_room_checks_see_what_they_forbid():
    host = ROOT / "sparsespec_jax" / "host" / "new.py"
    assert rooms_forbidden(host, {"sparsespec_jax.device.step"}) == {"device"}
    assert rooms_forbidden(host, {"sparsespec_jax.engine.Engine"}) == {"engine"}
    assert rooms_forbidden(host, {"sparsespec_jax.Engine"}) == {"__init__"}
    assert not rooms_forbidden(host, {"sparsespec_jax.plan", "sparsespec_jax.host.kv"})


def test_host_files_import_no_jax():
    """Also not through another of our files: a fresh interpreter must not load it."""
    host = (ROOT / "sparsespec_jax" / "host").glob("*.py")
    names = [*NO_JAX, *sorted(f"host.{path.stem}" for path in host)]
    code = (
        "import importlib, sys, types\n"
        "package = types.ModuleType('sparsespec_jax')\n"
        f"package.__path__ = [{str(ROOT / 'sparsespec_jax')!r}]\n"
        "sys.modules['sparsespec_jax'] = package\n"  # without its __init__
        f"for name in {names!r}:\n"
        "    importlib.import_module('sparsespec_jax.' + name)\n"
        "    if 'jax' in sys.modules: sys.exit(name + ' imports jax')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert len(names) > 12


def request_writes(source):
    """Lines of a source that write to a field of a Request."""
    fields = set(Request.__dataclass_fields__)
    growing = {"append", "extend", "insert", "pop", "clear"}
    lines = []
    for node in ast.walk(ast.parse(source)):
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            targets = [node.func.value] if node.func.attr in growing else []
        for target in targets:
            while isinstance(target, ast.Subscript):
                target = target.value
            if isinstance(target, ast.Attribute) and target.attr in fields:
                owner = ast.unparse(target.value)
                if re.search(r"(^|\.)(request|r|each)$", owner):
                    lines.append(node.lineno)
    return lines


def test_one_file_writes_to_requests():
    for path in source_files("sparsespec_jax"):
        is_owner = path.name == "scheduler.py"
        assert bool(request_writes(path.read_text("utf-8"))) == is_owner, path
    faults = (
        "output.request.tokens.extend(new)",
        "request.status = 1",
        "request.prefilled += 2",
        "r.tokens[3] = 1",
    )
    for fault in faults:
        assert request_writes(fault) == [1], fault


def test_few_files_reach_the_kernels():
    users = {
        str(path.relative_to(ROOT / "sparsespec_jax"))
        for path in source_files("sparsespec_jax")
        if any(name.startswith("pallas_kernels") for name in imported_modules(path))
    }
    assert users <= {
        "array_types.py",
        "device/attention.py",
        "device/attention_probe.py",
        "device/filling.py",
        "models/draft_weights.py",
        "models/layer.py",
        "models/products.py",
        "models/transformer.py",
        "policies/base.py",
        "proposers/eagle.py",
        "sizes.py",
    }


@pytest.mark.parametrize("path", source_files(*PACKAGES), ids=relative)
def test_files_stay_short(path):
    limit = LONGER.get(path.name, MAX_LINES)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_import_checks_see_what_they_forbid(tmp_path):
    fault = tmp_path / "fault.py"
    fault.write_text("def f():\n    from jax import numpy\n    import a.b as c\n")
    assert imported_modules(fault) == {"jax", "jax.numpy", "a.b"}


def read_pyproject():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_extras_exist_and_cover_the_compile_gates():
    extras = read_pyproject()["project"]["optional-dependencies"]
    assert {"test", "plots", "tpu", "cuda", "aot", "dev"} <= extras.keys()
    assert "sparsespec-jax[aot]" in extras["test"]
    names = {re.split(r"[<>=]", item)[0] for item in extras["aot"]}
    assert {"jax[tpu]", "jax-cuda13-plugin", "jax-cuda13-pjrt"} <= names


def test_every_requirement_has_a_floor_and_a_ceiling():
    project = read_pyproject()["project"]
    extras = project["optional-dependencies"].values()
    for item in [*project["dependencies"], *(i for extra in extras for i in extra)]:
        own = item.startswith("sparsespec-jax[")
        assert own or "==" in item or (">=" in item and "<" in item), item


def test_readme_starts_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    block = text.split("```")[1]
    assert [line.split("#")[0].strip() for line in block.strip().splitlines()] == [
        "make demo",
        "make test",
    ]
    targets = re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.M)
    assert {"demo", "test", "lint"} <= set(targets)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def readme_code():
    """The Python block of README.md and what it prints."""
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (output,) = re.findall(r"```text\n(.*?)```", text, re.S)
    return block, output


def test_readme_code_is_six_lines():
    assert len([line for line in readme_code()[0].splitlines() if line]) <= 6


def test_readme_code_prints_what_it_says(capsys):
    block, output = readme_code()
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["results"][0].text.strip()
    assert capsys.readouterr().out == output


def readme_commands():
    """[(command, what it prints)] of the console blocks, in their order."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", text, re.S)
    parts = "".join(blocks).split("$ ")
    return [tuple(part.split("\n", 1)) for part in parts if part]


def run_readme_commands(folder, commands):
    """Run them as in a fresh clone; nothing but what they print is compared."""
    (folder / "experiments").symlink_to(ROOT / "experiments")
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    for command, printed in commands:
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.stdout == printed, (command, done.stderr)


def test_readme_commands_print_what_it_says(tmp_path):
    """Those of a tiny model; the last one loads weights, and is slow."""
    *cheap, _ = readme_commands()
    assert len(cheap) == 3
    run_readme_commands(tmp_path, cheap)


@pytest.mark.slow
def test_readme_command_with_weights_prints_what_it_says(tmp_path):
    run_readme_commands(tmp_path, readme_commands()[-1:])


def test_readme_says_how_the_demo_ends():
    path = ROOT / "experiments/results/demo_cpu/summary.json"
    summary = json.loads(path.read_text())
    same, total = summary["comparison"], summary["speculative"]["total"]
    length, drafts = total["mean_acceptance_length"], total["max_draft_tokens"]
    accepted = total["mean_accepted_draft_tokens"]
    assert (ROOT / "README.md").read_text().split("```")[3].strip().splitlines() == [
        f"{same['num_identical']} of {same['num_tokens']} tokens identical to plain "
        "decoding",
        f"acceptance length {length:.2f} of {drafts + 1} "
        f"({accepted:.2f} of {drafts} drafts accepted)",
        f"KV bytes per token: {total['kv_read_ratio']:.3f} of plain decoding",
    ]


def test_readme_installs_extras_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"pip install -e \"\.\[(\w+)\]\"", text))
    assert {"cuda", "tpu", "notebook"} <= named
    assert named <= project["optional-dependencies"].keys()
    assert any("ipywidgets" in d for d in project["optional-dependencies"]["notebook"])
    assert ". .venv/bin/activate" in text


def test_readme_is_short_and_its_links_exist():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert "docs/front_page.svg" in links and "docs/report.md" in links
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_readme_flags_exist():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"experiments\.generate(.*)", text)
    used = {flag for line in commands for flag in re.findall(r"--(\w+)", line)}
    fields = set(experiment_config.GenerateConfig.__dataclass_fields__)
    assert used and used <= fields | set(RunOptions.__dataclass_fields__)


def test_readme_figures_are_those_of_their_files():
    results = ROOT / "experiments" / "results"
    text = (ROOT / "README.md").read_text()
    section = text.split("## Four figures")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if "](exp" in line]
    equal = json.loads((results / "demo_cpu/summary.json").read_text())["comparison"]
    acceptance = json.loads((results / "acceptance_smollm2_cpu.json").read_text())
    (pillar,) = (
        row["mean_accepted_draft_tokens"]["mean"]
        for row in acceptance["rows"]
        if (row["policy"], row["budget_ratio"]) == ("pillar", 0.05)
    )
    exact = [
        json.loads((results / name / "summary.json").read_text())
        for name in ("exact_smollm2_h200", "exact_coder15_h200")
    ]
    same, tokens = (
        sum(found[name] for found in exact) for name in ("identical_tokens", "tokens")
    )
    points = json.loads((results / "speedup_map_h100.json").read_text())["rows"]
    gains = [point["chosen_speedup"] for point in points]
    assert [row[0].strip() for row in rows] == [
        f"{equal['num_identical']} of {equal['num_tokens']}",
        f"{same:,} of {tokens:,}",
        f"{pillar:.2f} of {acceptance['flags']['num_draft_tokens']}",
        f"{min(gains):.2f} to {max(gains):.2f}",
    ]


def test_the_picture_of_the_readme_is_of_the_results_that_are_there(tmp_path):
    results = ROOT / "experiments" / "results"
    stored = (ROOT / "docs" / "front_page.svg").read_text()
    assert front_page.sources(results) in stored
    front_page.draw(results, tmp_path / "drawn.svg")
    assert front_page.sources(results) in (tmp_path / "drawn.svg").read_text()
    command = "python -m experiments.front_page --output docs/front_page.svg"
    assert command in (ROOT / "README.md").read_text()


def find_python(path, **variables):
    command = ["/bin/sh", str(ROOT / "tools" / "find_python.sh")]
    environment = {"PATH": str(path), "HOME": str(path), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def fake_python(path, *, status):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\nexit {status}\n")
    path.chmod(0o755)


def test_find_python_passes_over_shims_that_fail(tmp_path):
    fake_python(tmp_path / "python3.13", status=127)
    fake_python(tmp_path / "python3", status=0)
    assert find_python(tmp_path).stdout.strip() == str(tmp_path / "python3")


def test_find_python_looks_into_pyenv(tmp_path):
    fake_python(tmp_path / "python3", status=1)
    inside = tmp_path / ".pyenv" / "versions" / "3.14.1" / "bin" / "python"
    fake_python(inside, status=0)
    assert find_python(tmp_path).stdout.strip() == str(inside)
    moved = tmp_path / "elsewhere" / "versions" / "3.12.0" / "bin" / "python"
    fake_python(moved, status=0)
    found = find_python(tmp_path, PYENV_ROOT=str(tmp_path / "elsewhere"))
    assert found.stdout.strip() == str(moved)


def test_find_python_fails_in_one_line(tmp_path):
    result = find_python(tmp_path)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: no Python >= 3.12")
