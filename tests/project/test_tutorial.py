"""Every line of docs/tutorial.md, in its order, in one shell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_l2g.autoload import VARIABLE, with_trainers

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"


@pytest.mark.long
def test_every_line_of_the_tutorial_runs(tmp_path):
    text = TUTORIAL.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    assert len(blocks) >= 7 and {kind for kind, _ in blocks} == {"bash"}
    environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_")} | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        VARIABLE: with_trainers(""),  # an editable install does not place the start-up file
        "nnUNet_n_proc_DA": "2",
        "nnUNet_def_n_proc": "2",
    }
    script = "set -euo pipefail\n" + "\n".join(block for _, block in blocks)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    for result in ("report/report.html", "report_test/report.html", "look/summary.json"):
        assert (tmp_path / result).stat().st_size > 100, result
    assert list((tmp_path / "look").glob("*.png")) and list((tmp_path / "look").rglob("*.nii.gz"))
