"""Networks cast as a whole, as plain nnU-Net can be: .half(), .bfloat16(), .double()."""

import copy

import network_tester as tester
import pytest
import torch

from nnunet_l2g.architectures.glua.network import GLUA
from nnunet_l2g.architectures.grcsf.network import GRCSF
from nnunet_l2g.architectures.l2gnet.network import L2GNet

SMALL = dict(width=16, depth=1, decoder_width=8, decoder_depth=1)


NETWORKS = {
    "l2gnet": lambda plan: L2GNet(tester.make_backbone(plan, False), dim=16, per_class=2),
    "glua": lambda plan: GLUA(tester.make_backbone(plan, False)),
    "grcsf": lambda plan, **how: GRCSF(
        tester.make_backbone(plan, False), tester.PLANS[plan][3], [8] * tester.PLANS[plan][1], dim=16, autoencoder=SMALL, **how
    ),
    "dog": lambda plan: NETWORKS["grcsf"](plan, residual="dog"),
    "other": lambda plan: NETWORKS["grcsf"](plan, residual="other"),
}


def make(name: str, plan: str):
    """A network whose parameters that start at zero are not zero."""
    network = NETWORKS[name](plan)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize(("dtype", "close"), [(torch.float16, 0.02), (torch.bfloat16, 0.1), (torch.float64, 1e-4)])
@pytest.mark.parametrize("plan", ["plain_2d", "plain_3d"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_cast_network_gives_the_same_logits(name, plan, dtype, close):
    network, x = make(name, plan).eval(), tester.make_input(plan)
    cast = copy.deepcopy(network).to(dtype)
    with torch.no_grad():
        expected, found = network(x), cast(x.to(dtype))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().mean() < close * expected.abs().mean()


@pytest.mark.parametrize("name", ["l2gnet", "grcsf"])
def test_a_network_trains_in_double(name):
    network = make(name, "plain_2d").double().train()
    assert torch.isfinite(torch.tensor(tester.train_steps(network, tester.make_input("plain_2d").double(), 2)))
