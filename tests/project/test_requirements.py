"""What the package imports is what setup.cfg declares, not what happens to come along with something else."""

import ast
import configparser
import re
import sys
from importlib.metadata import packages_distributions

from throwaway import ROOT

FOLDERS = ("nnunet_l2g", "trainers", "architectures")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported() -> set[str]:
    """Top-level modules that any file imports, anywhere in it, without Python's own and ours."""
    names = set()
    for file in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"nnunet_l2g"}


def test_each_direct_import_is_declared():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["options"]["install_requires"].splitlines()
    declared = {normal(re.match(r"[\w.-]+", line).group()) for line in lines if line and not line.startswith("#")}
    distributions = packages_distributions()
    undeclared = {name for name in imported() if declared.isdisjoint(map(normal, distributions.get(name, ["?"])))}
    assert not undeclared
