"""The README's commands exist, what is imported is declared, and the code keeps its style."""

import ast
import configparser
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from nnunet_l2g import trainers
from nnunet_l2g.cli import COMMANDS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_ci_runs_the_readmes_test_line():
    pattern = re.search(r"grep -m 1 -E '(.*)' README.md", (ROOT / ".ci" / "run").read_text()).group(1)
    lines = [line for line in README.splitlines() if re.search(pattern, line)]
    assert len(lines) == 1


def test_every_command_and_trainer_is_described_and_every_one_described_exists():
    assert set(re.findall(r"\bnnunet_l2g (\w+)", README)) <= set(COMMANDS)
    for name in (*COMMANDS, *trainers.__all__):
        assert re.search(rf"\b{name}\b", README), f"README does not mention {name}"
    for name in set(re.findall(r"nnUNetTrainer(?:L2GNet|GRCSF|GLUA)\w*", README)):
        assert hasattr(trainers, name), f"README mentions {name}, which does not exist"


def anchors(document: Path) -> set[str]:
    """What a link to a heading of the document may name."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_pictures_and_named_files_exist():
    for document in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]:
        text = document.read_text(encoding="utf-8")
        for path, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
            if not path.startswith("http"):
                target = document.parent / path if path else document
                assert target.exists(), f"{document.name} links to {path}"
                assert not anchor or anchor in anchors(target), f"{document.name} links to {path}#{anchor}"
        for name in re.findall(r"`((?:tests|benchmarks|docs)/[\w/.]+)`", text):
            assert (ROOT / name).exists(), f"{document.name} names {name}"


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_each_direct_import_is_declared():
    """Anywhere in a file: a module that comes along with another package may stay away with its next version."""
    imported = set()
    for file in (path for folder in ("nnunet_l2g", "trainers", "architectures") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.partition(".")[0])
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines() + config["options.extras_require"]["onnx"].splitlines()
    declared = {normal(re.match(r"[\w.-]+", line).group()) for line in lines if line and not line.startswith("#")}
    distributions = packages_distributions()
    imported -= {"nnunet_l2g", *sys.stdlib_module_names}
    undeclared = {name for name in imported if declared.isdisjoint(map(normal, distributions.get(name, [name])))}
    assert not undeclared


def test_ruff():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", ROOT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
