"""Launchers name a wrong option before any work starts."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "status", "message"),  # status 1: absl's own checks
    [
        ("throughput load=smollm2_256x4096", 2, "unexpected argument 'load=smoll"),
        ("divergence --num_prompts=-3", 1, "--num_prompts=-3"),
        ("divergence --model=nowhere", 2, "there is no model at 'nowhere'"),
        ("divergence --max_tokens=9000", 2, "was made for 8192"),
        ("lossless --model=nowhere", 2, "there is no model at 'nowhere'"),
        ("lossless --max_tokens=9000", 2, "was made for 8192"),
        ("lossless --lags=7", 2, "lag must be an integer in [0, 2], got 7"),
        ("offload --new_tokens=0", 1, "--new_tokens=0"),
        ("offload --lag=7", 2, "lag must be an integer in [0, 2], got 7"),
        ("simulate --policies=offload,swap", 1, "policies takes some of"),
        ("speedup_map --acceptance=3", 1, "--acceptance=3"),
        ("speedup_map --choices=4,8", 2, "choices must hold 0"),
        ("speedup_map --load=smollm2_256x4096", 2, "has no preset: name --model"),
        ("speedup_map --slots=8,900", 2, "900 slots can hold only ["),
        ("step_time --scope=head", 2, "scope must be one of"),
        ("step_time --policy=nothing", 2, "policy must be one of"),
        ("study --study=policies --mode=live", 1, "--mode=live"),
        ("study --study=policies --contexts=none.json", 2, "no file none.json"),
        ("study --study=policies --smoke --continuations=none", 2, "no file none"),
        ("train_eagle --contexts=none.json", 2, "no file none.json"),
        ("train_eagle --measure=eagel", 1, "measure takes eagle, ngram and pillar"),
    ],
)
def test_a_wrong_option_is_named_at_once(command, status, message, tmp_path):
    name, *options = command.split()
    place = "output_dir" if name in ("study", "train_eagle") else "output"
    options.append(f"--{place}={tmp_path / 'out'}")
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *options],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == status
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
