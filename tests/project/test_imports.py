"""Imports go down only: commands, trainers, architectures, and what all of them stand on."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = {"architectures": ROOT / "architectures", "trainers": ROOT / "trainers", "": ROOT / "nnunet_l2g"}
COMMANDS = {"adapt", "compare", "inspect", "demo", "release", "cli", "doctor", "env"}
METHODS = {path.parent.name for path in (ROOT / "architectures").glob("*/__init__.py")}
# a folder, and what nothing in it may import
FORBIDDEN = {
    "phantom": COMMANDS | {"trainers", "architectures", "training", "evaluation"},
    "evaluation": COMMANDS | {"trainers", "architectures", "training"},
    "training": COMMANDS | {"trainers", "architectures"},
    "architectures": COMMANDS | {"trainers"},
    "trainers": COMMANDS,
}


def imported(folder):
    """(file, dotted name without the package) of all that a folder imports from the package, at any place of a file."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nnunet_l2g":
                for alias in node.names:
                    yield path, ".".join([*node.module.split(".")[1:], alias.name])


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_import_goes_up(folder):
    where = PACKAGE.get(folder, PACKAGE[""] / folder)
    up = [(str(path), name) for path, name in imported(where) if name.split(".")[0] in FORBIDDEN[folder]]
    assert not up


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_method_imports_another(method):
    others = tuple(f"architectures.{other}." for other in METHODS - {method})
    assert not [(str(path), name) for path, name in imported(ROOT / "architectures" / method) if name.startswith(others)]


def test_the_check_sees_imports():
    assert ("training", "stages") in {tuple(name.split(".")[:2]) for _, name in imported(ROOT / "trainers")}
