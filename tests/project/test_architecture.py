"""The worked example of docs/architecture.md: its code runs as it stands there."""

import re
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def test_the_worked_example_runs(monkeypatch):
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    example = page.split("## Worked example")[1].split("\n## ")[0]
    blocks = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", example, re.M | re.S)
    assert len(blocks) == 4
    for name, code in blocks:
        module = ModuleType(importable(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        exec(compile(code, name, "exec"), module.__dict__)
    trainer = sys.modules["nnunet_l2g.trainers.bottleneck_se"].nnUNetTrainerBottleneckSE
    assert trainer.network_class.__name__ == "BottleneckSE"
    sys.modules["test_bottleneck_se"].test_every_plan("plain_2d")


def importable(name: str) -> str:
    """The module that a file of the project is, for example nnunet_l2g.trainers.base of trainers/base.py."""
    if name.startswith("tests/"):
        return Path(name).stem
    dotted = name.removesuffix(".py").replace("/", ".")
    return dotted if dotted.startswith("nnunet_l2g.") else f"nnunet_l2g.{dotted}"
