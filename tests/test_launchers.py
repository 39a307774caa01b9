"""Launchers name a wrong option before any work starts."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("throughput load=smollm2_256x4096", "unexpected argument 'load=smoll"),
        ("divergence --num_prompts=-3", "--num_prompts=-3"),
        ("divergence --model=nowhere", "there is no model at 'nowhere'"),
        ("lossless --model=nowhere", "there is no model at 'nowhere'"),
        ("offload --new_tokens=0", "--new_tokens=0"),
        ("offload --lag=7", "lag must be an integer in [0, 2], got 7"),
        ("simulate --policies=offload,swap", "policies takes some of"),
        ("speedup_map --acceptance=3", "--acceptance=3"),
        ("step_time --scope=head", "scope must be one of"),
        ("step_time --policy=nothing", "policy must be one of"),
        ("study --study=policies --mode=live", "--mode=live"),
        ("study --study=policies --contexts=none.json", "no file none.json"),
        ("train_eagle --contexts=none.json", "no file none.json"),
        ("train_eagle --measure=eagel", "measure takes eagle, ngram and pillar"),
    ],
)
def test_a_wrong_option_is_named_at_once(command, message, tmp_path):
    name, *options = command.split()
    place = "output_dir" if name in ("study", "train_eagle") else "output"
    options.append(f"--{place}={tmp_path / 'out'}")
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *options],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode in (1, 2)  # 1: absl's own checks of flags
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
