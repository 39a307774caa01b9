"""Launchers name a wrong option before any work starts: what absl and the shell see.

What their own checks say is in test_checked_before_work.py.
"""

import pytest


@pytest.mark.parametrize(
    ("command", "status", "message"),  # status 1: absl's own checks
    [
        ("throughput load=smollm2_256x4096", 2, "unexpected argument 'load=smoll"),
        ("throughput --load=nothing", 2, "load must be one of"),
        ("divergence --num_prompts=-3", 2, "num_prompts must be at least 0, got -3"),
        ("divergence --num_prompts=few", 1, "--num_prompts=few"),
        ("lossless --model=nowhere", 2, "there is no model at 'nowhere'"),
        ("offload --new_tokens=0", 2, "new_tokens must be at least 1, got 0"),
        ("simulate --policies=offload,swap", 2, "policies must be one of"),
        ("speedup_map --acceptance=3", 2, "acceptance must be at most 1, got 3"),
        ("study --study=policies --mode=live", 2, "mode must be one of"),
        ("study", 2, "--study is missing"),
        ("train_eagle --measure=eagel", 2, "measure must be one of"),
        ("report", 1, "Unknown command line flag 'smoke'"),
    ],
)
def test_a_wrong_option_is_named_at_once(parent, command, status, message, tmp_path):
    name, *options = command.split()
    options.append(f"--output={tmp_path / 'out'}")
    if name == "report":
        options.append("--smoke")
    done = parent.run_module(f"experiments.{name}", *options)
    assert done.returncode == status
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
