"""The page of promises names tests that exist, and the counts that were measured."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def load(name):
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def test_all_that_is_named_exists():
    named = set(re.findall(r"`((?:tests|benchmarks|docs)/[\w/.]+)`", PAGE))
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).exists()]


def test_kills_are_those_of_the_record():
    record = load("benchmarks/kills_cpu.json")
    number, during = record["kills"], record["in_a_checkpoint_write"]
    assert number >= 30 and during >= 10
    assert f"{number} kills of five trainings in all their stages, {during} of them during a write" in PAGE
    assert len(record["trainers"]) == 5
    for trainer, kills in record["trainers"].items():
        parts = {kill["saved"][0] for kill in kills}  # 0: in a stage, 1: in the segmenter
        assert 1 in parts and (0 in parts) == ("GRCSF" in trainer or "GLUA" in trainer), trainer


def test_fuzzing_is_that_of_the_record():
    record = load("tests/fuzz/fuzzed.json").values()
    assert min(entry["seconds"] for entry in record) >= 120
    millions = sum(entry["executions"] for entry in record) / 1e6
    mended = sum(entry["findings_mended"] for entry in record)
    assert f"{len(record)} parsers, at least 120 s each, {millions:.1f} million executions, {mended} faults" in PAGE


def test_versions_are_those_of_the_record():
    """A row in compatibility.md for each run, each Python with the oldest and the newest versions, without a failure."""
    record = load("benchmarks/environments.json")
    page = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").split("## Versions")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| 3.")]
    assert rows == [
        [run["python"], run["nnunetv2"], run["torch"], run["numpy"], f"{run['passed']} passed, {run['skipped']} skipped"]
        for run in record
    ]
    assert all(run["exit_status"] == run["failed"] == run["error"] == 0 for run in record)
    ends = {(run["python"].rsplit(".", 1)[0], run["versions"]) for run in record}
    continuous = {("3.11", "newest")}  # whole, and not only the short suite, in each CI run
    assert ends | continuous == {(f"3.{minor}", end) for minor in (10, 11, 12, 13) for end in ("oldest", "newest")}
