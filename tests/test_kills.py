"""A few kills of the many in benchmarks/kills_cpu.json: a training with a stage, at random moments and in checkpoint writes."""

import json
import sys

import pytest
from test_benchmarks import script

KILLS = 3


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="kills forked processes, and looks for orphans with ps")
def test_nothing_is_lost_to_a_kill(tmp_path):
    result = tmp_path / "kills.json"
    script("kills.py", "--kills", KILLS, "--trainers", "GRCSF", "--seed", 5, "--folder", tmp_path / "data", "--json", result)
    assert json.loads(result.read_text())["kills"] == KILLS

