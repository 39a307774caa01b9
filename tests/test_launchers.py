"""Launchers name a wrong option before any work starts: what absl and the shell see.

What their own checks say is in test_checked_before_work.py.
"""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("command", "status", "message"),  # status 1: absl's own checks
    [
        ("throughput load=smollm2_256x4096", 2, "unexpected argument 'load=smoll"),
        ("divergence --num_prompts=-3", 1, "--num_prompts=-3"),
        ("lossless --model=nowhere", 2, "there is no model at 'nowhere'"),
        ("offload --new_tokens=0", 1, "--new_tokens=0"),
        ("simulate --policies=offload,swap", 1, "policies takes some of"),
        ("speedup_map --acceptance=3", 1, "--acceptance=3"),
        ("study --study=policies --mode=live", 1, "--mode=live"),
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
