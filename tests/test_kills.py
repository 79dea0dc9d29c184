"""A few kills of the many in benchmarks/kills_cpu.json: a training with a stage, at random moments and in checkpoint writes."""

import json
import sys

import pytest
from test_benchmarks import BENCHMARKS, script

KILLS = 3


@pytest.mark.commands
@pytest.mark.skipif(sys.platform != "linux", reason="kills forked processes, and looks for orphans with ps")
def test_nothing_is_lost_to_a_kill(tmp_path):
    result = tmp_path / "kills.json"
    script("kills.py", "--kills", KILLS, "--trainers", "GRCSF", "--seed", 5, "--folder", tmp_path / "data", "--json", result)
    assert json.loads(result.read_text())["kills"] == KILLS


def test_the_recorded_kills_are_those_that_are_promised():
    recorded = json.loads((BENCHMARKS / "kills_cpu.json").read_text())
    assert recorded["kills"] >= 30 and recorded["in_a_checkpoint_write"] >= 10
    for trainer, kills in recorded["trainers"].items():
        parts = {kill["saved"][0] for kill in kills}
        assert 1 in parts and (0 in parts) == ("GRCSF" in trainer or "GLUA" in trainer), trainer
