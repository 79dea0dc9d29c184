"""One tester for all networks: what each of our architectures has to fulfil, over the kinds of plans that nnU-Net makes."""

import copy
import math

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

torch.set_num_threads(1)  # the networks are tiny: more threads would only wait for each other

# name: class, dimension, input channels, patch, strides
PLANS = {
    "plain_2d": (PlainConvUNet, 2, 1, (32, 48), [1, 2, 2]),
    "plain_3d": (PlainConvUNet, 3, 1, (16, 16, 24), [1, 2, 2]),
    "plain_3d_anisotropic": (PlainConvUNet, 3, 1, (6, 32, 32), [[1, 1, 1], [1, 2, 2], [2, 2, 2]]),
    "plain_3d_4_channels": (PlainConvUNet, 3, 4, (16, 16, 16), [1, 2, 2]),
    "resenc_2d_3_channels": (ResidualEncoderUNet, 2, 3, (32, 32), [1, 2, 2, 2]),
    "resenc_3d_anisotropic": (ResidualEncoderUNet, 3, 1, (5, 32, 32), [[1, 1, 1], [1, 2, 2], [1, 2, 2]]),
}
CLASSES = 3


def make_backbone(plan: str, deep_supervision: bool = True) -> nn.Module:
    """A small network of the kind that a plan asks for, initialised as nnU-Net does. The weights are the same each time."""
    cls, dim, channels, _, strides = PLANS[plan]
    torch.manual_seed(0)
    stages = len(strides)
    depth = "n_blocks_per_stage" if cls is ResidualEncoderUNet else "n_conv_per_stage"
    backbone = cls(
        input_channels=channels,
        n_stages=stages,
        features_per_stage=[8, 12, 16, 16][:stages],
        conv_op={2: nn.Conv2d, 3: nn.Conv3d}[dim],
        kernel_sizes=3,
        strides=strides,
        num_classes=CLASSES,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op={2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dim],
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
        **{depth: 1},
    )
    backbone.apply(backbone.initialize)
    return backbone


def make_input(plan: str, batch: int = 2) -> torch.Tensor:
    _, _, channels, patch, _ = PLANS[plan]
    return torch.randn(batch, channels, *patch, generator=torch.Generator().manual_seed(1))


def make_target(x: torch.Tensor) -> torch.Tensor:
    """Labels (B, 1, *spatial) that follow the image, as nnU-Net's loader gives them."""
    return x[:, :1].add(1).clamp(0, CLASSES - 1).round()


def training_loss(network, x):
    """A loss of all outputs plus the auxiliary loss."""
    outputs = network(x)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    loss = sum(output.float().square().mean() for output in outputs)
    auxiliary = network.auxiliary_loss(make_target(x)) if hasattr(network, "auxiliary_loss") else None
    return loss if auxiliary is None else loss + auxiliary


def smooth(network: nn.Module) -> nn.Module:
    """Replaces each LeakyReLU by SiLU: the gradient of LeakyReLU jumps where rounding moves a value across 0."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LeakyReLU):
                setattr(module, name, nn.SiLU())
    return network


def train_steps(network, x, steps: int) -> float:
    """A few optimiser steps as the trainer makes them. Returns the last loss."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.9, nesterov=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = training_loss(network, x)
        loss.backward()
        optimizer.step()
        network.after_step()
    return float(loss.detach())


def check_network(make, plan: str):
    """All checks below but torch.compile's. `make()` returns a new network for the plan, with the same weights each time."""
    check_starts_as_plain(make(), plan)
    check_logits_only(make(), plan)
    check_every_parameter_learns(make(), plan)
    check_saves_and_loads(make(), make(), plan)
    check_copies(make(), plan)
    check_plain_weights_load(make(), plan)
    check_diagnostics(make(), plan)


def check_starts_as_plain(network, plan: str):
    """The logits of every output equal the plain network's before the first step, in training and in eval mode."""
    plain, x = make_backbone(plan), make_input(plan)
    for mode in (True, False):
        expected, found = plain.train(mode)(x), network.train(mode)(x)
        assert isinstance(found, list) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def check_logits_only(network, plan: str):
    """eval without deep supervision returns one tensor (B, classes, *patch) and leaves no auxiliary loss."""
    network.eval().decoder.deep_supervision = False
    x = make_input(plan)
    with torch.no_grad():
        logits = network(x)
    assert isinstance(logits, torch.Tensor) and logits.shape == (len(x), CLASSES, *x.shape[2:])
    assert network.auxiliary_loss() is None
    network.decoder.deep_supervision = True


def check_every_parameter_learns(network, plan: str):
    """Every parameter has a finite gradient in the first step, as DDP needs it, and one that is not 0 after two steps.

    Frozen parameters never have one.
    """
    network.train()
    x = make_input(plan)
    for step in range(3):
        training_loss(network, x).backward()
        for name, parameter in network.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, f"{name} is frozen and has a gradient"
                continue
            assert parameter.grad is not None, f"{name} has no gradient"
            assert torch.isfinite(parameter.grad).all(), f"{name} has a non-finite gradient"
            if step == 2:
                assert parameter.grad.abs().max() > 0, f"{name} never learns"
        train_steps(network, x, 1)
        network.zero_grad()


def check_saves_and_loads(network, other, plan: str):
    """A new network with the weights of a trained one has the same logits."""
    x = make_input(plan)
    train_steps(network.train(), x, 2)
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    with torch.no_grad():
        for one, two in zip(network.eval()(x), other.eval()(x), strict=True):
            assert torch.equal(one, two)


def check_copies(network, plan: str):
    """A deepcopy after a training forward, as an EMA teacher makes it, has the same logits."""
    x = make_input(plan)
    network.train()(x)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for one, two in zip(network.eval()(x), copied.eval()(x), strict=True):
            assert torch.equal(one, two)


def check_plain_weights_load(network, plan: str):
    """Weights of plain nnU-Net load as with -pretrained_weights, and what the plain network lacks keeps its values."""
    plain = make_backbone(plan)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    before = {key: value.clone() for key, value in network.state_dict().items() if key not in plain.state_dict()}
    network.plain_weights_only = True
    assert set(network.state_dict()) == set(plain.state_dict())
    network.load_state_dict(plain.state_dict())
    assert network.plain_weights_loaded
    network.plain_weights_only = False
    for key, value in {**plain.state_dict(), **before}.items():
        assert torch.equal(network.state_dict()[key], value), key


def check_diagnostics(network, plan: str):
    """After training steps there is a number for each key, in order."""
    train_steps(network.train(), make_input(plan), 2)
    values = network.diagnostics()
    assert list(values) == network.diagnostic_keys() and all(math.isfinite(value) for value in values.values())


def check_compiled(network, plan: str, make_target=make_target, backend="aot_eager", steps: int = 2):
    """Compiled in train mode without a graph break, it has eager's losses, gradients and state in each of several steps."""
    torch._dynamo.reset()
    x, eager = make_input(plan), smooth(network).train()
    raw = copy.deepcopy(eager)
    compiled = torch.compile(raw, backend=backend, fullgraph=True)
    pairs = [(eager, eager), (compiled, raw)]
    optimizers = [torch.optim.SGD([p for p in one.parameters() if p.requires_grad], 1e-2) for _, one in pairs]
    for _ in range(steps):
        raw.load_state_dict(eager.state_dict())  # otherwise the rounding of one step would grow in the next
        losses = []
        for (forward, one), optimizer in zip(pairs, optimizers, strict=True):
            optimizer.zero_grad()
            loss = sum(output.square().mean() for output in forward(x)) + (one.auxiliary_loss(make_target(x)) or 0)
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
        for (name, one), two in zip(eager.named_parameters(), raw.parameters(), strict=True):
            if one.requires_grad:
                torch.testing.assert_close(two.grad, one.grad, rtol=2e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        for (_, one), optimizer in zip(pairs, optimizers, strict=True):
            optimizer.step()
            torch.manual_seed(4)
            one.after_step()
        for (name, one), two in zip(eager.state_dict().items(), raw.state_dict().values(), strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
