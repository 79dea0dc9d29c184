"""What speed and memory are measured with: the counters, the scripts on a CPU, the page; and commands without torch."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_benchmarks import BENCHMARKS, script

sys.path.append(str(BENCHMARKS))

from timing import peak_bytes, ratios, take_turns

CPU = torch.device("cpu")
ROOT = BENCHMARKS.parent


# counters


def test_bytes_kept_for_the_backward_are_counted_once_and_at_their_peak():
    weight, x = torch.randn(10, 10, requires_grad=True), torch.randn(25, 10, requires_grad=True)

    def step():
        for _ in range(2):  # freed in between: the peak is one pass
            y = x @ weight  # keeps x (1000 bytes) and weight
            (y * y).sum().backward()  # keeps y twice: 1000 bytes, once

    assert peak_bytes(step, CPU, [weight]) == 2000
    assert peak_bytes(step, CPU) == 2400
    with torch.no_grad():
        assert peak_bytes(lambda: x @ weight, CPU) == 0


def test_gradients_are_the_same_under_the_counter():
    weight = torch.randn(6, 6, requires_grad=True)
    gradients = []

    def step():
        gradients.append(torch.autograd.grad((weight @ weight).tanh().sum(), weight)[0])

    step()
    peak_bytes(step, CPU)
    assert torch.equal(*gradients)


def test_networks_take_turns_and_ratios_are_of_the_same_round():
    order = []
    times = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, CPU, 2, 2)
    assert "".join(order) == "aabbbbaa" and [len(calls) for calls in times["a"]] == [2, 2]
    slow_second_round = {"a": [[1.0, 1.0, 9.0], [10.0]], "b": [[2.0], [30.0]]}
    found = ratios("b", slow_second_round, "a")
    assert (found["ratio_to_vanilla"], found["ratio_range"]) == (2.5, [2.0, 3.0])


# scripts


@pytest.mark.slow
def test_step_time_measures_every_method_and_its_stage(tmp_path):
    output = tmp_path / "step.json"
    arguments = ("--plan", "tiny_anisotropic", "--device", "cpu", "--threads", 1, "--rounds", 1, "--steps", 1, "--warmup", 1)
    script("step_time.py", *arguments, "-o", output, cwd=tmp_path)
    result = json.loads(output.read_text())
    networks = result["networks"]
    assert list(networks) == [
        "nnUNetTrainer", "nnUNetTrainerL2GNet", "nnUNetTrainerGRCSF", "nnUNetTrainerGRCSF, autoencoder", "nnUNetTrainerGLUA",
        "nnUNetTrainerGLUA, translation",
    ]  # fmt: skip
    assert result["tokens"] == 4 * 8 * 8
    assert networks["nnUNetTrainer"]["ratio_to_vanilla"] == networks["nnUNetTrainer"]["memory_ratio"] == 1
    assert networks["nnUNetTrainerGLUA"]["memory_ratio"] > 1.2  # of both domains: the second stage aligns
    assert networks["nnUNetTrainerGLUA"]["parameters"] == networks["nnUNetTrainer"]["parameters"]
    assert networks["nnUNetTrainerGLUA, translation"]["prediction"] is None
    assert all(network["median_seconds"] > 0 and network["memory_mib"] > 0 for network in networks.values())
    assert list(tmp_path.iterdir()) == [output]  # nnU-Net's logs went to a temporary folder


def test_real_plans_are_counted_without_running_them(tmp_path):
    output = tmp_path / "count.json"
    script("step_count.py", "--plan", "tiny", "-o", output, cwd=tmp_path)
    rows = json.loads(output.read_text())["plans"]["tiny"]
    assert rows["GLUA"]["forward_ratio"] == 1 and rows["GLUA"]["memory_ratio"] > 1.2
    assert rows["L2GNet"]["memory_mib_by_part"]["l2g"] > 0 and rows["GRCSF"]["forward_ratio"] > 1
    assert 2.5 < rows["vanilla"]["gflop"] / (2 * rows["vanilla"]["forward_gflop"]) < 3.01  # batch 2, forward and backward


def test_sinkhorns_solvers_compute_the_same_and_large_sizes_are_skipped(tmp_path):
    output = tmp_path / "sinkhorn.json"
    sizes = ("--n", 40, 4000, "--p", 8, "--batch", 2, "--calls", 2, "--max-mib", 10, "--no-compile")
    child = script("sinkhorn.py", *sizes, "--device", "cpu", "--threads", 1, "-o", output, cwd=tmp_path)
    rows = json.loads(output.read_text())["results"]
    small = {row["solver"]: row for row in rows if row["n"] == 40}
    assert set(small) == {"ours", "unrolled", "POT batch", "POT per sample", "geomloss"}
    assert all(row["gradient_difference"] < 1e-5 for name, row in small.items() if name != "geomloss")
    assert small["unrolled"]["memory_mib"] > 5 * small["ours"]["memory_mib"]
    large = {row["solver"]: row for row in rows if row["n"] == 4000}
    assert "MiB" in large["unrolled"]["skipped"] and large["ours"]["median_ms"] > 0
    assert "skipped: would take about" in child.stdout


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path):
    output, figure = tmp_path / "growth.json", tmp_path / "growth.png"
    arguments = ("--factors", 1, 2, "--rounds", 1, "--steps", 1, "--threads", 1, "--device", "cpu")
    script("growth.py", *arguments, "-o", output, "--figure", figure, cwd=tmp_path)
    rows = json.loads(output.read_text())["results"]
    memory = {(row["series"], row["network"], row["value"]): row["memory_mib"] for row in rows}
    assert memory["voxels", "vanilla", 2] == pytest.approx(2 * memory["voxels", "vanilla", 1], rel=0.05)
    assert memory["p", "L2GNet", 256] > memory["p", "L2GNet", 16]
    assert figure.stat().st_size > 10_000


def test_a_training_step_of_ours_waits_no_more_often_than_vanillas(tmp_path):
    output = tmp_path / "sync.json"
    names = ("nnUNetTrainerL2GNet", "nnUNetTrainerGRCSF", "nnUNetTrainerGLUA")
    script("host_sync.py", "--device", "cpu", "--threads", 1, "-tr", *names, "-o", output, cwd=tmp_path)
    rows = json.loads(output.read_text())["trainers"]
    waits = {name: row["waits"] for name, row in rows.items()}
    assert {name: waits[name] for name in ("nnUNetTrainer", *names)} == dict.fromkeys(("nnUNetTrainer", *names), 1)
    assert waits["nnUNetTrainerGRCSF, autoencoder"] == 1
    assert any("trainers/glua.py" in key and "chosen.any()" in key for key in rows["nnUNetTrainerGLUA"]["places"])


@pytest.mark.slow
def test_a_case_is_predicted_by_every_network(tmp_path):
    output = tmp_path / "inference.json"
    arguments = ("--plan", "tiny_2d", "--rounds", 1, "--threads", 1, "--device", "cpu", "--no-mirroring")
    script("inference_time.py", *arguments, "-o", output, cwd=tmp_path)
    result = json.loads(output.read_text())
    assert result["case"] == [96, 144] and len(result["networks"]) == 4
    assert all(row["median_seconds"] > 0 for row in result["networks"].values())
    assert "expected 2" in script("inference_time.py", "--plan", "tiny_2d", "--size", 9, fails=True, cwd=tmp_path).stderr


@pytest.mark.slow
def test_compare_is_timed(tmp_path):
    output = tmp_path / "compare.json"
    script("compare_time.py", "--cases", 3, "--runs", 1, "--size", 32, 32, 8, "-o", output, cwd=tmp_path)
    result = json.loads(output.read_text())
    assert result["each_s"] == pytest.approx((result["total_s"] - result["two_cases_s"]) / 2, abs=0.001)


# the page


def test_the_page_says_what_the_files_say():
    child = subprocess.run([sys.executable, BENCHMARKS / "performance_page.py", "--check"], capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr


def test_the_page_follows_the_files_and_lists_what_is_missing(tmp_path, monkeypatch):
    import performance_page

    for file in BENCHMARKS.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(performance_page, "FOLDER", tmp_path)
    before = performance_page.make_page()
    assert "-o benchmarks/step_time_malc_cuda.json" in before and "| L2GNet, training step | 1.03 | not yet |" in before
    measured = json.loads((tmp_path / "step_time_cpu.json").read_text()) | {"plan": "malc", "cuda": "13.2"}
    measured["networks"]["nnUNetTrainerL2GNet"]["ratio_to_vanilla"] = 1.0157
    (tmp_path / "step_time_malc_cuda.json").write_text(json.dumps(measured))
    after = performance_page.make_page()
    assert "-o benchmarks/step_time_malc_cuda.json" not in after and "| L2GNet, training step | 1.03 | malc 1.02 |" in after


def test_every_command_of_the_page_and_every_link_exists():
    page = (ROOT / "docs" / "performance.md").read_text()
    named = re.findall(r"benchmarks/(\w+\.py)", page)
    assert len(set(named)) > 5 and all((BENCHMARKS / name).exists() for name in named)
    for target in re.findall(r"\]\(([^)#]+)", page):
        assert (ROOT / "docs" / target).exists(), target


def test_commands_of_the_page_are_understood():
    """Each option it names is one of the script's."""
    page = (ROOT / "docs" / "performance.md").read_text()
    block = page.partition("```bash\n")[2].partition("```")[0]
    for line in block.splitlines():
        _, file, *arguments = line.split()
        source = (ROOT / file).read_text()
        for option in (argument for argument in arguments if argument.startswith("-")):
            name = option.replace("--no-", "--")
            assert f'"{name}"' in source or f'f"--{{name}}"' in source, f"{file} has no {option}"  # noqa: F541


# commands


@pytest.mark.parametrize("command", ["--help", "--version", "env", "register", "unregister"])
def test_light_commands_import_no_torch(tmp_path, command):
    """Not installed anywhere, so that `register` finds nothing to write."""
    package = tmp_path / "nnunet_l2g"
    package.symlink_to(ROOT / "nnunet_l2g")
    code = (
        "import sys; from nnunet_l2g.cli import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as error: status = error.code\n"
        "print(status, [name for name in sys.modules if name.split('.')[0] in ('torch', 'nnunetv2', 'numpy')])"
    )
    child = subprocess.run(
        [sys.executable, "-S", "-c", code, command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    status = 1 if "register" in command else 0
    assert child.stdout.splitlines()[-1:] == [f"{status} []"], child.stdout + child.stderr
    assert not any(path.suffix in (".pth", ".start") for path in Path(tmp_path).iterdir())
