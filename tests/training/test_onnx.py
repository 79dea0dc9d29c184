"""Networks outside PyTorch: torch.export with a free batch size, and ONNX, equal in onnxruntime."""

import network_tester as tester
import pytest
import torch
from test_casts import make

BATCH = ({0: torch.export.Dim("batch", min=1, max=64)},)


@pytest.mark.slow
def test_the_batch_size_of_an_exported_network_is_free():
    network, x = make("grcsf", "plain_2d").eval(), tester.make_input("plain_2d")
    exported = torch.export.export(network, (x,), dynamic_shapes=BATCH).module()
    for image in (x[:1], torch.cat([x, x, x])):
        torch.testing.assert_close(exported(image), network(image))


@pytest.mark.long
@pytest.mark.parametrize("plan", ["plain_2d", "plain_3d"])
@pytest.mark.parametrize("name", ["l2gnet", "grcsf", "glua"])
def test_onnxruntime_computes_the_same(tmp_path, name, plan):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    network, x = make(name, plan).eval(), tester.make_input(plan)
    file = tmp_path / "network.onnx"
    torch.onnx.export(network, (x,), file, dynamo=True, dynamic_shapes=BATCH, input_names=["image"], output_names=["logits"])
    session = runtime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for image in (x[:1], torch.cat([x, x, x])):
        (logits,) = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), network(image).detach(), rtol=1e-4, atol=1e-4)
