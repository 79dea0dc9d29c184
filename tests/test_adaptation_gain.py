"""Does adaptation help? Cine to black-blood phantoms, all by command lines, as benchmarks/adaptation.py runs them."""

import json

import pytest
from test_benchmarks import script

pytestmark = pytest.mark.long


def test_adapted_it_finds_what_source_only_training_does_not(tmp_path, monkeypatch):
    """A few minutes of training, no label of the target. The ceiling is 0.96; one run with half the translation had 0.34."""
    for name in ("nnUNet_n_proc_DA", "nnUNet_def_n_proc"):
        monkeypatch.setenv(name, "2")
    output = tmp_path / "gain.json"
    command = (
        "adaptation.py", "--pair", "phantom", "--folder", tmp_path, "--device", "cpu", "--iterations", 200, "--batch-size", 4,
        "--translation-share", 3, "--translator-width", 8, "--slices", 4, "--methods", "source only", "GLUA",
    )  # fmt: skip
    script(*command, "--epochs", 3, "-o", output, timeout=2700)
    (rows,) = json.loads(output.read_text())["repeats"]
    before, after = rows["source only"], rows["GLUA"]
    assert len(after["dice"]) == 12
    assert before["mean_dice"] < 0.15 and after["mean_dice"] > before["mean_dice"] + 0.2
    assert sum(after["dice"][case] > before["dice"][case] for case in after["dice"]) >= 11
    assert not (tmp_path / "raw" / "Dataset902_PhantomBlackBlood" / "labelsTr").exists()
    other = script(*command, "--epochs", 4, fails=True)  # what is there would be taken for it
    assert "epochs: there 3, here 4" in other.stderr and "name another --folder" in other.stderr
