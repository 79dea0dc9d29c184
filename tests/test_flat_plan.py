"""benchmarks/flat_plan.py: the same tokens, transported as a plain insertion would and as ours."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_model import make_plans, write_case, write_model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "flat_plan.py"


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.slow
def test_numbers_are_the_layers_own_and_a_figure_is_drawn(tmp_path):
    model, (image, label) = write_model(tmp_path, "nnUNetTrainerL2GNet", make_plans()), write_case(tmp_path / "in")
    done = run("-m", model, "-i", image, "-l", label, "--figure", tmp_path / "plans.png", "-o", tmp_path / "plans.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plans.json").read_text())
    rows = list(found["plans"].values())
    assert len(rows) == 4 and (tmp_path / "plans.png").stat().st_size > 10_000
    assert rows[0]["kept_variance"] < rows[2]["kept_variance"]  # sharper, centred
    assert all(1 <= row["tokens_per_reference"] <= found["tokens"] + 1e-6 for row in rows)

    from nnunet_l2g.cli import main

    assert main(["inspect", "-m", str(model), "-f", "0", "-i", str(image), "-l", str(label), "-o", str(tmp_path / "look")]) == 0
    (level,) = json.loads((tmp_path / "look" / "summary.json").read_text())["l2gnet"]["levels"].values()
    assert np.isclose(rows[3]["kept_variance"], level["plan"]["kept_variance"], rtol=1e-3)
    assert np.isclose(rows[3]["tokens_per_reference"], level["plan"]["tokens_per_reference"], rtol=1e-3)


@pytest.mark.parametrize("trainer", ["nnUNetTrainerL2GNetNoTransport", "nnUNetTrainerL2GNetSoftmax"])
def test_a_model_without_transport_is_refused(tmp_path, trainer):
    model, (image, _) = write_model(tmp_path, trainer, make_plans()), write_case(tmp_path / "in")
    done = run("-m", model, "-i", image)
    assert done.returncode == 1 and f"{trainer} has no transport" in done.stderr
