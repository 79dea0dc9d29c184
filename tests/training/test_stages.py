"""Stages: run, saved, resumed, refused."""

import pytest
import torch
from torch import nn

from nnunet_l2g.errors import UserError
from nnunet_l2g.training.stages import Stage, run_stage


class Line(Stage):
    """Fits a line; deterministic for a given order of batches."""

    name = "line"
    keys = ("loss",)

    def __init__(self, network, epochs=4, iterations=3, stop_at=None, **settings):
        super().__init__(epochs, iterations, 2, {"kind": "line", **settings})
        self.module, self.stop_at, self.steps, self.ended = network.part, stop_at, 0, False

    def begin(self):
        self.module.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.module.parameters(), 0.1)

    def train_step(self, batch):
        if self.steps == self.stop_at:
            raise KeyboardInterrupt
        self.steps += 1
        self.optimizer.zero_grad()
        loss = (self.module(batch["data"]) - 2 * batch["data"] - 1).square().mean()
        loss.backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}

    def validation_step(self, batch):
        return {"loss": float((self.module(batch["data"]) - 2 * batch["data"] - 1).square().mean())}

    def end(self):
        self.module.requires_grad_(False)
        self.ended = True

    def state_dict(self):
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state["optimizer"])


class Network(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.part, self.rest = nn.Linear(1, 1), nn.Linear(2, 2)
        self.part.requires_grad_(False)


def batches():
    generator = torch.Generator().manual_seed(1)
    while True:
        yield {"data": torch.randn(8, 1, generator=generator), "keys": ["a"]}


def run(folder, stage, network, skip=0, **options):
    lines, source = [], batches()
    for _ in range(skip):
        next(source)
    validation = {"data": torch.ones(2, 1)}
    run_stage(stage, network, lambda: next(source), lambda: validation, str(folder), lines.append, **options)
    return lines


def test_a_stage_trains_its_module_alone_and_freezes_it(tmp_path):
    network = Network()
    before = network.rest.weight.clone()
    stage = Line(network, epochs=40)
    lines = run(tmp_path, stage, network)
    assert abs(float(network.part.weight) - 2) < 0.1 and torch.equal(network.rest.weight, before)
    assert stage.ended and not network.part.weight.requires_grad
    assert len(lines) == 40 and "stage line, epoch 40 of 40: train_loss" in lines[-1] and "validation_loss" in lines[-1]
    assert (tmp_path / "progress_line.png").stat().st_size > 1000
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize("stop_at", [1, 3, 7, 11])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop_at):
    """Batches follow their number: the stopped run resumes at the epoch after the last saved one."""
    whole = Network()
    (tmp_path / "whole").mkdir()
    run(tmp_path / "whole", Line(whole), whole)
    network = Network()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Line(network, stop_at=stop_at), network)
    other = Network(seed=5)  # another start, as a new process has
    saved = stop_at // 3
    lines = run(tmp_path, Line(other), other, skip=3 * saved, resume=True)
    assert f"{saved} of 4 epochs" in lines[0]
    assert torch.equal(other.part.weight, whole.part.weight)
    assert torch.equal(other.rest.weight, network.rest.weight)  # the whole network is in the checkpoint, from the start


def test_a_finished_stage_is_not_trained_again(tmp_path):
    network = Network()
    run(tmp_path, Line(network), network)
    other = Network(seed=5)
    stage = Line(other)
    lines = run(tmp_path, stage, other, resume=True)
    assert stage.steps == 0 and stage.ended and len(lines) == 1
    assert torch.equal(other.part.weight, network.part.weight) and not other.part.weight.requires_grad


def test_the_stage_of_another_trainer_is_taken_without_the_rest_of_its_network(tmp_path):
    network = Network()
    run(tmp_path, Line(network), network, owner="one")
    other = Network(seed=5)
    rest = other.rest.weight.clone()
    run(tmp_path, Line(other), other, resume=True, owner="other")
    assert torch.equal(other.part.weight, network.part.weight) and torch.equal(other.rest.weight, rest)


def test_nothing_is_written_where_checkpoints_are_disabled_or_on_other_ranks(tmp_path):
    for name, options in (("disabled", {"save": False}), ("rank", {"rank": 1})):
        (tmp_path / name).mkdir()
        network = Network()
        run(tmp_path / name, Line(network), network, **options)
        assert not list((tmp_path / name).glob("*.pth"))


def test_saved_every_so_many_epochs_and_at_the_end(tmp_path):
    network = Network()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Line(network, epochs=5, stop_at=11), network, save_every=2)
    assert torch.load(tmp_path / "stage_line.pth", weights_only=True)["epoch"] == 2
    run(tmp_path, Line(network, epochs=5), network, save_every=2)
    assert torch.load(tmp_path / "stage_line.pth", weights_only=True)["epoch"] == 5


@pytest.mark.parametrize(
    "content", [b"not a checkpoint", "truncated", {"name": "line"}, [1, 2]], ids=["text", "truncated", "incomplete", "list"]
)
def test_a_broken_checkpoint_is_named_and_left_alone(tmp_path, content):
    file, network = tmp_path / "stage_line.pth", Network()
    if content == "truncated":
        run(tmp_path, Line(network), network)
        content = file.read_bytes()[:-200]
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"stage_line\.pth .*Remove it and continue with --c"):
        run(tmp_path, Line(Network()), Network(), resume=True)
    assert file.read_bytes() == before


def test_a_foreign_checkpoint_is_refused_and_says_why(tmp_path):
    network = Network()
    run(tmp_path, Line(network, fold=0), network)
    with pytest.raises(UserError, match=r"another training \(epochs: there 4, here 6; fold: there 0, here 1\)"):
        run(tmp_path, Line(network, fold=1, epochs=6), network, resume=True)


def test_a_loss_that_is_not_finite_stops_the_stage_and_names_the_cases(tmp_path):
    network = Network()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Line(network, stop_at=4), network)
    before = (tmp_path / "stage_line.pth").read_bytes()
    nn.init.constant_(network.part.weight, float("nan"))
    with pytest.raises(FloatingPointError, match=r"epoch 1 \(cases \['a'\]\).*continue with --c"):
        run(tmp_path, Line(network), network, save=False)
    assert (tmp_path / "stage_line.pth").read_bytes() == before


class SpoiltAtTheEnd(Line):
    """Its weights are spoilt by a step whose own loss was fine."""

    def train_step(self, batch):
        found = super().train_step(batch)
        if self.steps == 6:
            nn.init.constant_(self.module.weight, float("nan"))
        return found


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    network = Network()
    with pytest.raises(FloatingPointError, match=r"validation numbers \[nan\] of epoch 2 are not finite"):
        run(tmp_path, SpoiltAtTheEnd(network), network)
    checkpoint = torch.load(tmp_path / "stage_line.pth", weights_only=True)
    assert checkpoint["epoch"] == 1 and torch.isfinite(checkpoint["module"]["weight"]).all()


class Nothing(Line):
    nothing_to_learn = "all is labelled."

    def train_step(self, batch):
        return super().train_step(batch) if self.steps == 0 else {}


def test_steps_without_numbers_do_not_count_and_an_epoch_of_them_is_refused(tmp_path):
    network = Network()
    with pytest.raises(UserError, match="no batch of epoch 2 had anything to learn from: all is labelled"):
        run(tmp_path, Nothing(network), network)
    history = torch.load(tmp_path / "stage_line.pth", weights_only=True)["history"]
    assert history["train_loss"][0] > 0.1  # of the one step, not of three
