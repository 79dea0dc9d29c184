"""One tester for all networks: what every architecture of ours has to hold, over the plans nnU-Net can make."""

import copy

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

torch.set_num_threads(1)  # the networks are tiny; two threads only wait for each other when the machine is busy

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
    """A small network of the kind a plan asks for, initialised as nnU-Net does. Same seed, same weights."""
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
    """A loss over all outputs plus the auxiliary one."""
    outputs = network(x)
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    loss = sum(output.float().square().mean() for output in outputs)
    auxiliary = network.auxiliary_loss(make_target(x)) if hasattr(network, "auxiliary_loss") else None
    return loss if auxiliary is None else loss + auxiliary


def smooth(network: nn.Module) -> nn.Module:
    """SiLU in the place of each LeakyReLU, whose gradient jumps where other rounding moves a value across its kink."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LeakyReLU):
                setattr(module, name, nn.SiLU())
    return network


def train_steps(network, x, steps: int) -> float:
    """A few optimiser steps as the trainer makes them; the last loss."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, momentum=0.9, nesterov=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = training_loss(network, x)
        loss.backward()
        optimizer.step()
        network.after_step()
    return float(loss.detach())


def check_starts_as_plain(network, plan: str):
    """Same logits as the plan's plain network before the first step, in training and in eval, at every output."""
    plain, x = make_backbone(plan), make_input(plan)
    for mode in (True, False):
        expected, found = plain.train(mode)(x), network.train(mode)(x)
        assert isinstance(found, list) and len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def check_logits_only(network, plan: str):
    """eval without deep supervision: one tensor (B, classes, *patch); no state left behind."""
    network.eval().decoder.deep_supervision = False
    x = make_input(plan)
    with torch.no_grad():
        logits = network(x)
    assert isinstance(logits, torch.Tensor) and logits.shape == (len(x), CLASSES, *x.shape[2:])
    assert network.auxiliary_loss() is None
    network.decoder.deep_supervision = True


def check_every_parameter_learns(network, plan: str):
    """Every parameter has a finite gradient at once (DDP), and after two steps each one is non-zero somewhere; frozen ones
    never have one."""
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
    """A strict load of a trained network into a fresh one, with and without deep supervision: identical logits."""
    x = make_input(plan)
    train_steps(network.train(), x, 2)
    other.load_state_dict(copy.deepcopy(network.state_dict()))
    with torch.no_grad():
        for one, two in zip(network.eval()(x), other.eval()(x), strict=True):
            assert torch.equal(one, two)


def check_copies(network, plan: str):
    """deepcopy after a training forward (an EMA teacher does it), same logits."""
    x = make_input(plan)
    network.train()(x)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for one, two in zip(network.eval()(x), twin.eval()(x), strict=True):
            assert torch.equal(one, two)
