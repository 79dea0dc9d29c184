"""GLUA's network: plain nnU-Net that in training also encodes unlabelled images."""

import copy

import network_tester as tester
import pytest
import torch

from nnunet_l2g.architectures import GLUA


def make_network(plan="plain_2d"):
    return GLUA(tester.make_backbone(plan))


@pytest.mark.parametrize("plan", tester.PLANS)
def test_every_plan(plan):
    tester.check_starts_as_plain(make_network(plan), plan)
    tester.check_logits_only(make_network(plan), plan)
    tester.check_every_parameter_learns(make_network(plan), plan)
    tester.check_saves_and_loads(make_network(plan), make_network(plan), plan)
    tester.check_copies(make_network(plan), plan)


@pytest.mark.parametrize("plan", tester.PLANS)
def test_unlabelled_images_change_no_logit_and_reach_the_encoder(plan):
    network, x = make_network(plan).train(), tester.make_input(plan)
    plain = network(x)
    network.unlabelled = torch.randn_like(x)
    network.objective = lambda outputs: outputs.target_features.square().mean()
    for one, two in zip(network(x), plain, strict=True):
        assert torch.equal(one, two)
    network.auxiliary_loss().backward()
    assert all(p.grad is not None for p in network.encoder.parameters())
    assert all(p.grad is None for n, p in network.decoder.named_parameters() if not n.startswith("encoder."))
    network.align = False
    network(x)
    outputs = network.auxiliary_outputs
    assert not outputs.target_features.requires_grad and not outputs.source_features.requires_grad
    copy.deepcopy(network)
    network.eval()
    assert network.unlabelled is None and network.auxiliary_loss() is None


def test_weights_are_plain_nnunets_and_the_settings():
    network, plain = make_network(), tester.make_backbone("plain_2d")
    assert network.state_dict().keys() - plain.state_dict().keys() == {"settings"}
    assert network.own_keys() == ["settings"]


def test_one_graph_and_the_same_gradients_under_compile():
    networks = [make_network().train() for _ in range(2)]
    forwards = [networks[0], torch.compile(networks[1], backend="aot_eager", fullgraph=True)]
    x, gradients = tester.make_input("plain_2d"), []
    for network, forward in zip(networks, forwards, strict=True):
        network.objective = lambda outputs: (outputs.target_features - 1).square().mean()
        for seed in range(2):  # the second batch must not see the first one's images
            network.unlabelled = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            network.zero_grad()
            loss = sum(output.square().mean() for output in forward(x)) + network.auxiliary_loss()
            loss.backward()
        gradients.append([p.grad for p in network.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)
