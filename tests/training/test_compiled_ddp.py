"""torch.compile under DDP, as nnU-Net runs with -num_gpus: one gloo process, a graph that DDP's buckets would cut."""

import copy

import network_tester as tester
import pytest
import torch
import torch.distributed as dist
from test_casts import make
from torch.nn.parallel import DistributedDataParallel

from nnunet_l2g.compatibility import keep_ddp_graphs_whole


@pytest.fixture
def gloo(tmp_path, monkeypatch):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 4096)  # small networks have several buckets, too
    torch._dynamo.reset()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    with torch._dynamo.config.patch(optimize_ddp=True):
        yield
    dist.destroy_process_group()


# the graphs hold what DDP's optimiser may not know how to cut: L2GNet an autograd.Function, GRCSF checkpoints
@pytest.mark.parametrize(
    "name", [pytest.param("l2gnet", marks=pytest.mark.slow), pytest.param("grcsf", marks=pytest.mark.long)]
)
def test_gradients_are_those_of_the_network_alone(gloo, name):
    keep_ddp_graphs_whole()
    network = make(name, "plain_2d").train()
    alone, x = copy.deepcopy(network), tester.make_input("plain_2d")
    wrapped = DistributedDataParallel(torch.compile(network, backend="aot_eager"), bucket_cap_mb=0.02)
    for forward, of in ((wrapped, network), (alone, alone)):
        (forward(x).square().mean() + of.auxiliary_loss(tester.make_target(x))).backward()
    for (key, one), two in zip(alone.named_parameters(), network.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(two.grad, one.grad, rtol=1e-3, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_only_torch_before_2_14_is_told(monkeypatch):
    for version, optimised in (("2.14.0", True), ("2.13.1", False)):
        monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
        with torch._dynamo.config.patch(optimize_ddp=True):
            keep_ddp_graphs_whole()
            assert torch._dynamo.config.optimize_ddp == optimised


def test_position_tables_are_no_part_of_ddps_broadcast(gloo):
    network = make("grcsf", "plain_2d")
    for module, prefix in ((network, ""), (torch.compile(network, backend="eager"), "_orig_mod.")):
        wrapped = DistributedDataParallel(module)
        assert set(wrapped.named_module_buffers) == {f"{prefix}settings"}
