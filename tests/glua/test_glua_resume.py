"""GLUA's checkpoints, and that two processes stay equal. tests/training/test_exact_resume.py continues its trainings."""

from pathlib import Path

import pytest
import torch
from distributed import run_two_processes
from glua_trainers import make, saved_after, strip
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from test_alignment import features
from test_glua_network import make_network
from test_trainers import CPU
from torch.nn.parallel import DistributedDataParallel

from nnunet_l2g.architectures.glua.alignment import AdversarialAlignment, DomainDiscriminator
from nnunet_l2g.architectures.glua.contrast_inversion import ContrastDistances
from nnunet_l2g.errors import UserError
from nnunet_l2g.trainers import adapted


def test_an_inverted_channel_stays_so(adapted_folders, capsys):
    """Measured on what `adapt` made; in the log, in the stage's checkpoint and in the segmenter's."""
    trainer = make(adapted_folders)
    trainer.on_train_start()
    assert "Channel 0 of the source is left as it is: Wasserstein distance to the target" in capsys.readouterr().out
    assert trainer.translator.inverted.tolist() == [False]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapted, "measure_contrast_distances", lambda source, target: [ContrastDistances(1.0, 0.125)])
        trainer = make(adapted_folders)
        trainer.on_train_start()
    assert "Channel 0 of the source is inverted" in capsys.readouterr().out
    again = make(adapted_folders, "GLUA", continues=True)  # the stage is finished, the segmenter has not begun
    again.on_train_start()
    assert again.translator.inverted.tolist() == [True]
    other = make(adapted_folders)
    other.initialize()
    other.load_extra_state(trainer.extra_state())
    assert other.translator.inverted.tolist() == [True]


def test_a_translator_of_other_sizes_is_refused_in_one_sentence(adapted_folders):
    other = make(adapted_folders, translation_settings={"width": 4, "halvings": 2})
    other.initialize()
    trainer = make(adapted_folders)
    trainer.initialize()
    with pytest.raises(UserError, match=r"translator of other sizes, expected .*'halvings': 1.* train anew without --c"):
        trainer.load_extra_state(other.extra_state())


def test_a_stripped_checkpoint_validates_but_does_not_continue(adapted_folders):
    file = strip(saved_after(make(adapted_folders, "GLUANoTranslation"), 1))
    resumed = make(adapted_folders, "GLUANoTranslation", continues=True)
    resumed.load_checkpoint(file)
    with pytest.raises(UserError, match="has nothing of what Small keeps beside the network"):
        resumed.on_train_start()


def test_disabled_checkpoints_write_nothing(adapted_folders):
    trainer = make(adapted_folders, "GLUANoTranslation")
    trainer.disable_checkpointing = True
    left = Path(trainer.output_folder, "checkpoint_best.pth.partial")  # by a run that was killed
    left.write_text("half")
    trainer.on_train_start()
    for name in ("latest", "best"):
        trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_{name}.pth")
    assert list(Path(trainer.output_folder).glob("*.pth*")) == [left] and left.read_text() == "half"


def test_vanilla_weights_load_through_nnunets_pretrained_weights(adapted_folders):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    plans = make(adapted_folders).plans_manager.plans | {"continue_training": False}
    plain = nnUNetTrainer(plans, "2d", 0, make(adapted_folders).dataset_json, CPU)
    plain.initialize()
    file = str(adapted_folders.folder / "plain.pth")
    torch.save({"network_weights": plain.network.state_dict()}, file)
    trainer = make(adapted_folders, "GLUASelfTraining")
    trainer.initialize()
    load_pretrained_weights(trainer.network, file)
    trainer.on_train_start()
    key = "encoder.stages.0.0.convs.0.conv.weight"
    for network in (trainer.network, trainer.teacher.network):
        assert torch.equal(network.state_dict()[key], plain.network.state_dict()[key])


# ---- DDP ----


def test_two_processes_have_equal_gradients_and_one_discriminator():
    first, second = run_two_processes(ddp_steps)
    whole = alignment_steps([0, 1])
    for key in first["gradients"]:
        assert torch.equal(first["gradients"][key], second["gradients"][key]), key
    for key in first["discriminator"]:
        assert torch.equal(first["discriminator"][key], second["discriminator"][key]), key
        torch.testing.assert_close(first["discriminator"][key], whole[key], rtol=1e-3, atol=1e-4)


def ddp_steps(rank):
    torch.manual_seed(0)
    network = make_network().train()
    wrapped = DistributedDataParallel(network)
    torch.manual_seed(rank)  # another start, as on nnU-Net's processes
    alignment = AdversarialAlignment(DomainDiscriminator(network.deep_channels, 2))
    network.objective = lambda outputs: alignment.loss(outputs.source_features, outputs.target_features)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    for step, weight in enumerate((0.0, 0.1, 0.1)):
        alignment.weight, network.align = weight, weight > 0
        torch.manual_seed(10 * step + rank)
        x, network.unlabelled = torch.randn(2, 2, 1, 32, 48)
        optimizer.zero_grad()
        loss = sum(output.square().mean() for output in wrapped(x))
        auxiliary = network.auxiliary_loss()
        (loss if auxiliary is None else loss + auxiliary).backward()
        gradients = {key: p.grad.clone() for key, p in network.named_parameters()}
        optimizer.step()
        alignment.step(torch.tensor([True, bool(rank)]))
    torch.manual_seed(0)
    return {"gradients": gradients, "discriminator": alignment_steps([rank])}


def alignment_steps(ranks):
    """The discriminator after steps on these processes' features, all translated."""
    torch.manual_seed(0)
    alignment = AdversarialAlignment(DomainDiscriminator(16, 2), lr=1e-3)
    for step in range(5):
        source, target = (
            torch.cat([features(s, 2, seed=100 * step + 10 * r + d) for r in ranks]) for d, s in ((0, 0.0), (1, 1.0))
        )
        alignment.loss(source, target)
        alignment.step()
    return alignment.discriminator.state_dict()
