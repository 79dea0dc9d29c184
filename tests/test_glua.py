"""GLUA in this process: mask, discriminator, network, target stream, trainer and its twins, resume, DDP, refusals."""

import copy
import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import network_tester as tester
import numpy as np
import pytest
import torch
from distributed import run_two_processes
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from planned import PLAIN, RICH, SIZE, SPACING, Planned
from test_trainers import CPU, make_batch
from torch.nn.parallel import DistributedDataParallel

from nnunet_l2g import trainers
from nnunet_l2g.adaptation import AdaptedTarget
from nnunet_l2g.adaptation.adversarial_alignment import AdversarialAlignment, alignment_weight
from nnunet_l2g.adaptation.domain_gap import DomainGap, feature_samples, intensity_samples, sliced_wasserstein
from nnunet_l2g.adaptation.self_training import Teacher, pseudo_label_loss, self_training_weight
from nnunet_l2g.adaptation.target_stream import WithUnlabelled
from nnunet_l2g.architectures import GLUA
from nnunet_l2g.cli import main
from nnunet_l2g.errors import UserError
from nnunet_l2g.layers.domain_discriminator import DomainDiscriminator
from nnunet_l2g.layers.local_feature_mask import local_feature_mask
from nnunet_l2g.phantom import write_dataset
from nnunet_l2g.training.random_intensity import RandomIntensity, random_curve

torch.set_num_threads(1)
TARGET, PLANS = "Dataset983_Late", "nnUNetPlans_to983"
TWINS = ("GLUA", "GLUATranslationOnly", "GLUANoMask", "GLUANoTranslation", "GLUASelfTraining")


# ---- mask and discriminator ----


def test_the_mask_is_detached_in_0_to_1_and_0_where_the_domains_cannot_be_told_apart():
    score = torch.tensor([[[0.5, 0.0, 1.0, 0.75, -3.0, 4.0]]], requires_grad=True)
    mask = local_feature_mask(score)
    assert not mask.requires_grad
    assert mask.flatten().tolist() == [0, 1, 1, 0.5, 1, 1]


@pytest.mark.parametrize("dims", [2, 3])
def test_the_mask_starts_at_0_whatever_the_features(dims):
    features = 50 * torch.randn(2, 12, *[4] * dims) + 7
    score = DomainDiscriminator(12, dims)(features)
    assert score.shape == (2, 1, *[4] * dims) and score.dtype == torch.float32
    assert local_feature_mask(score).max() < 1e-6


def test_the_discriminator_does_not_depend_on_the_scale_of_features():
    torch.manual_seed(0)
    source, target = torch.randn(2, 2, 8, 4, 4)
    scores = []
    for scale in (1.0, 100.0):
        discriminator = DomainDiscriminator(8, 2)
        torch.manual_seed(1)
        for parameter in discriminator.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        discriminator.observe(scale * source, scale * target)
        scores.append(discriminator(scale * target))
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="dims=1"):
        DomainDiscriminator(8, 1)


def features(shift, number=4, channels=16, seed=None):
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    f = torch.randn(number, channels, 6, 6, generator=generator)
    f[:, :4] += shift
    return f


def trained(shift, steps=60, **settings):
    torch.manual_seed(0)
    alignment = AdversarialAlignment(DomainDiscriminator(16, 2), **settings)
    for _ in range(steps):
        alignment.loss(features(0.0), features(shift))
        alignment.step()
    return alignment


def test_identical_domains_leave_the_mask_near_0_and_different_ones_raise_it():
    same, other = trained(0.0).diagnostics(), trained(1.5).diagnostics()
    assert same["mask_mean"] < 0.1 and 0.4 < same["domain_accuracy"] < 0.6
    assert other["mask_mean"] > 0.3 and other["domain_accuracy"] > 0.8


def test_each_gradient_reaches_its_own_side_alone():
    alignment = trained(1.5, 20)
    before = copy.deepcopy(alignment.discriminator.state_dict())
    alignment.weight = 1.0
    source, target = features(0.0).requires_grad_(), features(1.5).requires_grad_()
    for p in alignment.discriminator.parameters():
        p.grad = None  # of its training
    alignment.loss(source, target).backward()
    assert target.grad.abs().max() > 0 and source.grad is None
    assert all(p.grad is None for p in alignment.discriminator.parameters())
    target.grad = None
    alignment.step()
    assert target.grad is None and source.grad is None
    assert all(p.grad is not None and not p.requires_grad for p in alignment.discriminator.parameters())
    assert any(not torch.equal(v, before[k]) for k, v in alignment.discriminator.state_dict().items())


def test_the_loss_is_the_equation_and_the_twin_has_no_mask():
    alignment, target = trained(1.5, 20), features(1.5)
    score = alignment.discriminator(target)
    alignment.weight = 0.25
    expected = 0.25 * ((2 * score - 1).abs().clamp(0, 1) * (score - 1) ** 2).mean()
    torch.testing.assert_close(alignment.loss(target, target), expected)
    alignment.mask = False
    torch.testing.assert_close(alignment.loss(target, target), 0.25 * ((score - 1) ** 2).mean())
    alignment.weight = 0.0
    assert alignment.loss(target, target) is None


def test_the_alignment_closes_a_shift_of_the_features():
    alignment = trained(1.5, 40)
    shift = torch.zeros(1, 16, 1, 1)
    shift[:, :4] = 1.5
    shift.requires_grad_()
    optimizer = torch.optim.Adam([shift], 0.02)
    alignment.weight = 1.0
    for _ in range(100):
        optimizer.zero_grad()
        alignment.loss(features(0.0), features(0.0) + shift).backward()
        optimizer.step()
        alignment.step()
    assert shift[:, :4].detach().abs().mean() < 0.75


def test_only_translated_samples_count_as_source():
    alignments = [trained(1.0, 3) for _ in range(3)]
    source, target = features(0.0, seed=1), features(1.0, seed=2)
    other = source.clone()
    other[1:] += 5.0
    for alignment in alignments:
        alignment.discriminator.observe = lambda *_: None  # moments are of all samples
    first = torch.tensor([True, False, False, False])
    for alignment, images, chosen in zip(alignments, (source, other, other), (first, first, ~first), strict=True):
        alignment.loss(images, target)
        alignment.step(chosen)
    one, two, three = (torch.cat([p.flatten() for p in a.discriminator.parameters()]) for a in alignments)
    torch.testing.assert_close(one, two)
    assert not torch.allclose(one, three, atol=1e-6)
    alignments[0].loss(source, target)
    alignments[0].step(torch.zeros(4, dtype=torch.bool))  # none translated: the target's step alone
    assert all(torch.isfinite(p).all() for p in alignments[0].discriminator.parameters())


def test_the_weight_of_the_alignment_is_a_ramp():
    weights = [alignment_weight(t, 0.2, (1e-3, 5e-3)) for t in (0, 0.19, 0.2, 0.6, 1)]
    assert weights == pytest.approx([0, 0, 1e-3, 3e-3, 5e-3])
    assert [self_training_weight(t, 0.5) for t in (0, 0.5, 0.75, 1)] == pytest.approx([0, 0, 0.25, 0.5])


# ---- network ----


def make_network(plan="plain_2d", **settings):
    return GLUA(tester.make_backbone(plan), **settings)


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
    network.objective = lambda seen: seen.target.square().mean()
    for one, two in zip(network(x), plain, strict=True):
        assert torch.equal(one, two)
    network.auxiliary_loss().backward()
    assert all(p.grad is not None for p in network.encoder.parameters())
    assert all(p.grad is None for n, p in network.decoder.named_parameters() if not n.startswith("encoder."))
    network.align = False
    network(x)
    assert not network._seen.target.requires_grad and not network._seen.source.requires_grad
    copy.deepcopy(network)
    network.eval()
    assert network.unlabelled is None and network.auxiliary_loss() is None


def test_weights_are_plain_nnunets_and_settings():
    network, plain = make_network(), tester.make_backbone("plain_2d")
    assert network.state_dict().keys() - plain.state_dict().keys() == {"settings"}
    assert network.own_keys() == ["settings"]
    with pytest.raises(ValueError, match="level 3 does not exist, expected -3 to 2"):
        make_network(level=3)


def test_one_graph_and_the_same_gradients_under_compile():
    networks = [make_network().train() for _ in range(2)]
    forwards = [networks[0], torch.compile(networks[1], backend="aot_eager", fullgraph=True)]
    x, gradients = tester.make_input("plain_2d"), []
    for network, forward in zip(networks, forwards, strict=True):
        network.objective = lambda seen: (seen.target - 1).square().mean()
        for seed in range(2):  # the second batch must not see the first one's images
            network.unlabelled = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            network.zero_grad()
            loss = sum(output.square().mean() for output in forward(x)) + network.auxiliary_loss()
            loss.backward()
        gradients.append([p.grad for p in network.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


# ---- gap, random looks, self-training ----


def test_the_gap_of_shifted_gaussians_is_their_shift():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4000, 1)), rng.normal(size=(4000, 1))
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, b + 2) == pytest.approx(2, abs=0.1)
    a, b = rng.normal(size=(4000, 3)), rng.normal(size=(4000, 3)) + np.array([3.0, 0, 0])
    assert sliced_wasserstein(a, b, 500) == pytest.approx(3 / 3**0.5, rel=0.1)  # E theta_1^2 = 1/3
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b) != sliced_wasserstein(a, b, seed=1)


def test_samples_of_intensities_and_features():
    generator = torch.Generator().manual_seed(0)
    one, two, flat = torch.randn(2, 1, 8, 8), torch.arange(2.0 * 2 * 4 * 8 * 8).view(2, 2, 4, 8, 8), torch.randn(2, 2, 8, 2)
    assert intensity_samples(one, 50, generator).shape == (50, 1)
    patches = intensity_samples(two, 50, generator)
    assert patches.shape == (50, 18) and intensity_samples(flat, 5, generator).shape == (5, 2)
    patches = patches.reshape(50, 3, 3, 2)
    assert (patches[..., 1] - patches[..., 0] == 256).all() and (patches[:, 1] - patches[:, 0] == 8).all()
    assert feature_samples(torch.randn(2, 5, 3, 3), 100, generator).shape == (18, 5)


def test_the_gap_shrinks_by_a_right_translation_and_forgets_its_batches():
    gap, target = DomainGap(batches=2, samples=200), torch.randn(2, 1, 16, 16)
    for _ in range(3):
        gap.remember(torch.randn(2, 1, 16, 16) * 3 + 5, target)
    found = gap.measure(lambda x: torch.cat([x, -x], 1), lambda x: (x - 5) / 3)
    assert set(found) == {
        "gap_intensity", "gap_intensity_translated", "gap_features", "gap_features_translated",
    }  # fmt: skip
    for kind in ("intensity", "features"):
        assert found[f"gap_{kind}_translated"] < 0.2 * found[f"gap_{kind}"]
    assert gap.measure(lambda x: x, None) == {}


@pytest.mark.parametrize("shape", [(2, 1, 12, 10), (3, 2, 4, 8, 8)])
def test_random_looks_keep_shape_and_type_and_leave_the_image_alone(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    kept, looks = x.clone(), RandomIntensity(1.0)
    for _ in range(20):
        y = looks(x)
        assert y.shape == x.shape and y.dtype == x.dtype and torch.isfinite(y).all() and not torch.equal(x, y)
        axes = tuple(range(2, x.dim()))
        assert ((y.mean(axes) - x.mean(axes)).abs() <= 1.05 * x.std(axes)).all()
        assert (y.std(axes) / x.std(axes)).max() < 1.4
    assert torch.equal(x, kept)
    assert torch.equal(RandomIntensity(0.0)(x), x)
    assert torch.isfinite(looks(torch.full(shape, 3.0))).all()
    assert looks(x.half()).dtype == torch.float16
    with pytest.raises(ValueError, match="probability is 2"):
        RandomIntensity(2)


def test_curves_rise_unless_inverted_and_move_no_voxel():
    torch.manual_seed(0)
    x = torch.randn(200).sort().values
    for _ in range(20):
        assert (random_curve(x, invert=False).diff() >= -1e-6).all()
    assert any((random_curve(x).diff() <= 1e-6).all() for _ in range(20))


def test_the_teacher_follows_and_has_no_gradient():
    network = make_network()
    teacher = Teacher(network, decay=0.5)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1.0)
    for _ in range(30):
        teacher.follow(network)
    for one, two in zip(teacher.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    probabilities = teacher.probabilities(tester.make_input("plain_2d"))
    torch.testing.assert_close(probabilities.sum(1), torch.ones(2, 32, 48))
    assert not probabilities.requires_grad and network.decoder.deep_supervision


def test_pseudo_labels_count_where_the_teacher_is_sure():
    probabilities = torch.tensor([[[0.95, 0.6], [0.05, 0.4]]])  # (1, 2 labels, 2 voxels)
    logits = torch.zeros(1, 2, 2, requires_grad=True)
    loss, share = pseudo_label_loss(logits, probabilities, 0.9)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.log(2) / 2) and share == 0.5
    assert logits.grad[..., 0].any() and not logits.grad[..., 1].any()
    loss, share = pseudo_label_loss(torch.zeros(1, 2, 2), probabilities, 0.9, regions=True)
    assert float(loss) == pytest.approx(np.log(2) / 2) and share == 0.5


# ---- trainer ----


@pytest.fixture(scope="module")
def adapted(planned, tmp_path_factory):
    """Cine phantoms with labels, adapted to late enhancement phantoms whose labels are deleted first."""
    project = Planned(tmp_path_factory.mktemp("adapted"))
    for kind in ("raw", "preprocessed"):
        shutil.copytree(planned.path(kind, PLAIN), project.path(kind, PLAIN))
    shutil.copytree(planned.path("preprocessed", RICH), project.path("preprocessed", RICH))
    write_dataset(project.path("raw"), 5, 2, "late_enhancement", seed=7, dataset_id=983, name="Late", size=SIZE,
                  spacing=SPACING)  # fmt: skip
    shutil.rmtree(project.path("raw", TARGET, "labelsTr"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in project.variables.items():
            patch.setenv(name, value)
        assert main(["adapt", "-s", "981", "-t", "983", "-c", "2d", "3d_fullres", "-np", "1"]) == 0
    return project


@pytest.fixture
def folders(adapted, monkeypatch, tmp_path):
    """nnU-Net's variables, loaders without workers, results of this test's own."""
    for name, value in adapted.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "nnUNet_results"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return adapted


def small(name="GLUA", **settings):
    """A trainer whose translation starts at once."""
    attributes = dict(translation_settings={"width": 4}, stage_settings={"slices": 2, "crop": 32}, epochs=4, iterations=2)
    return type("Small", (getattr(trainers, f"nnUNetTrainer{name}"),), {**attributes, **settings})


def make(folders, name="GLUA", dataset=PLAIN, configuration="2d", plans=PLANS, batches=True, continues=False, **settings):
    """A trainer as nnU-Net's command makes it; `batches`: of random images instead of the loaders'."""
    folder = folders.path("preprocessed", dataset)
    content = json.loads((folder / f"{plans}.json").read_text()) | {"continue_training": continues}
    trainer = small(name, **settings)(content, configuration, 0, json.loads((folder / "dataset.json").read_text()), CPU)
    if batches:
        trainer.get_dataloaders = lambda: tuple(itertools.repeat(a_batch(trainer)) for _ in range(2))
    return trainer


def a_batch(trainer, number=2):
    batch = make_batch(trainer, number)
    return {**batch, "unlabelled": torch.randn(batch["data"].shape, generator=torch.Generator().manual_seed(1)) * 2 + 1}


def run_epochs(trainer, number):
    """Epochs as nnU-Net's run_training makes them."""
    for _ in range(number):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        steps = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
        trainer.on_train_epoch_end(steps)
        with torch.no_grad():
            trainer.on_validation_epoch_start()
            trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
        trainer.on_epoch_end()


@pytest.mark.parametrize("name", TWINS)
def test_every_twin_trains_and_logs_its_own(folders, name):
    trainer = make(folders, name)
    trainer.on_train_start()
    run_epochs(trainer, 4)
    logging = trainer.logger.local_logger.my_fantastic_logging
    expected = {"gap_intensity", "gap_features"}
    expected |= {"gap_intensity_translated", "gap_features_translated"} if name != "GLUANoTranslation" else set()
    expected |= {"mask_mean", "domain_accuracy", "alignment_weight"} if name != "GLUATranslationOnly" else set()
    expected |= {"confident_share"} if name == "GLUASelfTraining" else set()
    assert set(trainer.diagnostic_keys) == expected
    assert all(len(logging[key]) == 4 and np.isfinite(logging[key]).all() for key in expected)
    assert Path(trainer.output_folder, "progress_glua.png").stat().st_size > 1000
    assert Path(trainer.output_folder, "stage_translation.pth").exists() == (name != "GLUANoTranslation")
    if name != "GLUATranslationOnly":
        assert logging["alignment_weight"] == pytest.approx(
            [0, 1e-3 + 4e-3 * (1 / 3 - 0.2) / 0.8, 1e-3 + 4e-3 * (2 / 3 - 0.2) / 0.8, 5e-3]
        )
    trainer.on_train_end()
    # a prediction's network: plain nnU-Net's keys and the settings
    saved = torch.load(trainer.output_folder + "/checkpoint_final.pth", weights_only=False)["network_weights"]
    plain = nnUNetTrainer(trainer.plans_manager.plans | {"continue_training": False}, "2d", 0, trainer.dataset_json, CPU)
    plain.initialize()
    assert saved.keys() - plain.network.state_dict().keys() == {"settings"}
    network = type(trainer).build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, trainer.label_manager.num_segmentation_heads, False
    )
    network.load_state_dict(saved)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("dataset", [PLAIN, RICH])
@pytest.mark.parametrize("name", ["GLUA", "GLUASelfTraining"])
def test_regions_ignore_label_channels_and_dimensions(folders, name, dataset, configuration):
    trainer = make(folders, name, dataset, configuration, plans="nnUNetPlans")
    trainer.target = AdaptedTarget("Dataset000_None", Path(), [], [], [])  # batches need none
    trainer.on_train_start()
    trainer.current_epoch = 3
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    # nnU-Net leaves the lowest scale's head out of the loss
    gradients = {key: p.grad for key, p in trainer.network.named_parameters() if ".seg_layers.0." not in key}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    assert np.isfinite(list(trainer.diagnostics().values())).all()


class Stub(torch.nn.Module):
    """A translation that leaves its mark."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def draw_styles(self, n):
        return torch.rand(n, 8)

    def translate(self, x, styles):
        assert styles.shape == (len(x), 8)
        self.seen.append(styles)
        return x + 1000


def test_some_samples_are_translated_each_in_its_style_and_labels_stay(folders):
    trainer = make(folders)
    trainer.initialize()
    trainer.translator = Stub()
    images, shares = torch.randn(10, 1, 8, 8), []
    kept = images.clone()
    for _ in range(40):
        found = trainer._translate_some(images)
        changed = (found - images > 500).flatten(1).all(1)
        assert torch.equal(changed, trainer._translated) and torch.equal(found[~changed], images[~changed])
        assert torch.equal(images, kept)
        shares.append(float(changed.float().mean()))
    assert 0.6 < np.mean(shares) < 0.8
    styles = torch.cat(trainer.translator.seen)
    assert len(styles.unique(dim=0)) == len(styles)

    batch = a_batch(trainer)
    labels, seen = [t.clone() for t in batch["target"]], {}
    trainer.network.register_forward_pre_hook(lambda m, args: seen.update(data=args[0], unlabelled=m.unlabelled))
    loss, trainer.loss = trainer.loss, lambda output, target: seen.update(target=target) or loss(output, target)
    trainer.translated_share = 1.0
    trainer.train_step(batch)
    torch.testing.assert_close(seen["data"], batch["data"] + 1000)
    assert torch.equal(seen["unlabelled"], batch["unlabelled"])
    assert all(torch.equal(one, two) for one, two in zip(seen["target"], labels, strict=True))
    assert trainer.network.unlabelled is None


def test_twins_lack_what_their_name_says(folders):
    only = make(folders, "GLUATranslationOnly")
    only.initialize()
    assert only.alignment_of_features is None and "alignment" not in only.extra_state()
    only.network.register_forward_pre_hook(lambda m, args: None if m.unlabelled is None else pytest.fail("encoded the target"))
    only.train_step(a_batch(only))
    without = make(folders, "GLUANoTranslation")
    without.initialize()
    assert without.stages() == [] and without.translator is None and "translator" not in without.extra_state()
    images = torch.randn(2, 1, 8, 8)
    assert without._translate_some(images) is images and without._translated is None
    unmasked = make(folders, "GLUANoMask")
    unmasked.initialize()
    assert not unmasked.alignment_of_features.mask


@pytest.mark.parametrize(
    ("epochs", "iterations", "expected"), [(1000, 250, 32), (20, 250, 10), (1, 250, 1), (4, 10, 2), (100, 10000, 1)]
)
def test_the_length_of_the_translation(folders, epochs, iterations, expected):
    trainer = make(folders, epochs=epochs, iterations=iterations)
    trainer.initialize()
    (stage,) = trainer.stages()
    assert (stage.epochs, stage.iterations) == (expected, iterations)
    assert stage.settings["target"] == TARGET


def test_a_step_that_the_gradient_scaler_skips_moves_no_discriminator(folders):
    trainer = make(folders, "GLUANoTranslation")
    trainer.initialize()
    trainer.grad_scaler = torch.amp.GradScaler("cpu")
    trainer.train_step(a_batch(trainer))
    before = copy.deepcopy(trainer.alignment_of_features.discriminator.state_dict())
    assert int(before["batches"]) == 1
    trainer.loss = lambda output, target: output[0].sum() * float("inf")
    trainer.train_step(a_batch(trainer))
    after = trainer.alignment_of_features.discriminator.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


# ---- data ----


def test_target_patches_come_with_every_batch_and_domains_are_sampled_alike_in_the_first_stage(folders):
    trainer = make(folders, batches=False)
    trainer.initialize()
    for before, expected in ((True, 0.0), (False, trainer.oversample_foreground_percent)):
        trainer._before_translation = before
        for loader in trainer.get_dataloaders():
            assert isinstance(loader, WithUnlabelled)
            source, target = loader.labelled.data_loader, loader.target.data_loader
            assert source.oversample_foreground_percent == expected and trainer.oversample_foreground_percent > 0
            assert target.oversample_foreground_percent == 0 and not target.has_ignore
            batch = next(loader)
            assert batch["unlabelled"].shape == batch["data"].shape
            assert str(folders.path("preprocessed", TARGET)) in target._data.source_folder
            assert target.indices == [f"phantom_tr{i:03d}" for i in range(5)]


def test_masks_for_normalisation_are_each_domains_own(folders):
    trainer = make(folders, batches=False)
    trainer.initialize()
    trainer.target = dataclasses.replace(trainer.target, source_use_mask_for_norm=[True])
    loader, _ = trainer.get_dataloaders()
    names = [
        [type(t).__name__ for t in stream.data_loader.transforms.transforms] for stream in (loader.labelled, loader.target)
    ]
    assert ["MaskImageTransform" in n for n in names] == [True, False]
    trainer = make(folders, batches=False)
    trainer.initialize()
    trainer.configuration_manager.configuration["use_mask_for_norm"] = [True]
    loader, _ = trainer.get_dataloaders()
    names = [
        [type(t).__name__ for t in stream.data_loader.transforms.transforms] for stream in (loader.labelled, loader.target)
    ]
    assert ["MaskImageTransform" in n for n in names] == [False, True]


@pytest.mark.slow
def test_a_whole_training_on_the_loaders_without_any_label_of_the_target(folders):
    assert not folders.path("raw", TARGET, "labelsTr").exists()
    raw = folders.path("raw", TARGET)
    raw.rename(raw.with_name("away"))  # not even its images
    try:
        trainer = make(folders, batches=False)
        trainer.run_training()
    finally:
        raw.with_name("away").rename(raw)
    assert Path(trainer.output_folder, "checkpoint_final.pth").exists()
    assert not torch.equal(trainer.translator.target_styles, torch.zeros_like(trainer.translator.target_styles))


# ---- resume ----


def test_the_first_stage_continues_where_it_stopped(folders, capsys):
    trainer = make(folders, epochs=8)  # four epochs of translation
    trainer.initialize()
    stage = trainer.stages()[0]
    end_epoch, count = type(stage).end_epoch, []

    def stopping(self, epoch, *args):
        count.append(epoch)
        if len(count) == 3:
            raise KeyboardInterrupt
        return end_epoch(self, epoch, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(stage), "end_epoch", stopping)
        with pytest.raises(KeyboardInterrupt):
            trainer.on_train_start()
    resumed = make(folders, epochs=8, continues=True)
    resumed.on_train_start()
    output = capsys.readouterr().out
    assert "stage translation: 2 of 4 epochs are in" in output and "stage translation, epoch 4 of 4" in output
    assert resumed.translator.target_styles.any()


@pytest.mark.parametrize("name", ["GLUA", "GLUASelfTraining"])
def test_the_second_stage_continues_whole(folders, capsys, name):
    trainer = make(folders, name)
    trainer.on_train_start()
    run_epochs(trainer, 2)
    file = trainer.output_folder + "/checkpoint_latest.pth"
    trainer.current_epoch -= 1  # nnU-Net saves before it counts
    trainer.save_checkpoint(file)
    state = trainer.extra_state()
    capsys.readouterr()
    resumed = make(folders, name, continues=True)
    resumed.load_checkpoint(file)
    resumed.on_train_start()
    assert "stage translation" not in capsys.readouterr().out
    assert flatten(state).keys() == flatten(resumed.extra_state()).keys()
    for key, value in flatten(state).items():
        assert np.array_equal(value, flatten(resumed.extra_state())[key]), key
    x, styles = torch.randn(1, 1, 32, 32), trainer.translator.target_styles[:1]
    assert torch.equal(trainer.translator.translate(x, styles), resumed.translator.translate(x, styles))
    run_epochs(resumed, 1)


def flatten(state, prefix=""):
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flatten(value, f"{prefix}.{key}").items()}
    if isinstance(state, (list, tuple)):
        return flatten(dict(enumerate(state)), prefix)
    return {prefix: np.asarray(state)}


def test_a_stripped_checkpoint_validates_but_does_not_continue(folders):
    trainer = make(folders, "GLUANoTranslation")
    trainer.on_train_start()
    file = trainer.output_folder + "/checkpoint_latest.pth"
    trainer.save_checkpoint(file)
    checkpoint = torch.load(file, weights_only=False)
    del checkpoint["nnunet_l2g"]
    torch.save(checkpoint, file)
    resumed = make(folders, "GLUANoTranslation", continues=True)
    resumed.load_checkpoint(file)
    with pytest.raises(UserError, match="has no translator or discriminator"):
        resumed.on_train_start()


def test_disabled_checkpoints_write_nothing(folders):
    trainer = make(folders, "GLUANoTranslation")
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    trainer.save_checkpoint(trainer.output_folder + "/checkpoint_latest.pth")
    assert not list(Path(trainer.output_folder).glob("*.pth*"))


def test_vanilla_weights_load_through_nnunets_pretrained_weights(folders):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    plans = make(folders).plans_manager.plans | {"continue_training": False}
    plain = nnUNetTrainer(plans, "2d", 0, make(folders).dataset_json, CPU)
    plain.initialize()
    file = str(folders.folder / "plain.pth")
    torch.save({"network_weights": plain.network.state_dict()}, file)
    trainer = make(folders, "GLUASelfTraining")
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
    network.objective = lambda seen: alignment.loss(seen.source, seen.target)
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


# ---- refusals and the control ----


def test_plans_without_a_target_are_refused_before_anything_is_computed(folders):
    trainer = make(folders, plans="nnUNetPlans")
    trainer.get_dataloaders = lambda: pytest.fail("loaded data")
    with pytest.raises(UserError, match="name no target; make some with `nnunet_l2g adapt -s 981"):
        trainer.on_train_start()


def test_a_deleted_target_is_refused_by_name_but_prediction_does_not_ask(folders):
    data = folders.path("preprocessed", TARGET)
    data.rename(data.with_name("away"))
    try:
        trainer = make(folders)
        trainer.get_dataloaders = lambda: pytest.fail("loaded data")
        with pytest.raises(UserError, match=f"the target {TARGET} are gone"):
            trainer.on_train_start()
        trainer = make(folders)
        trainer.initialize()
        trainer.save_checkpoint(str(folders.folder / "checkpoint.pth"))
        trainer.load_checkpoint(str(folders.folder / "checkpoint.pth"))
    finally:
        data.with_name("away").rename(data)


@pytest.mark.parametrize("name", ["GLUA", "RandomIntensity"])
def test_cascades_are_refused(folders, name):
    folder = folders.path("preprocessed", PLAIN)
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["configurations"]["3d_lowres"] = {"inherits_from": "3d_fullres", "next_stage": "3d_cascade_fullres"}
    plans["configurations"]["3d_cascade_fullres"] = {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    (folder / "cascadePlans.json").write_text(json.dumps(plans))
    trainer = make(folders, name, configuration="3d_cascade_fullres", plans="cascadePlans")
    with pytest.raises(NotImplementedError, match="do not support cascades"):
        trainer.initialize()


@pytest.mark.parametrize("dataset", [PLAIN, RICH])
def test_the_random_intensity_control_needs_no_target_and_changes_images_alone(folders, dataset):
    trainer = make(folders, "RandomIntensity", dataset, plans="nnUNetPlans")
    trainer.get_dataloaders = lambda: tuple(itertools.repeat(make_batch(trainer, 2)) for _ in range(2))
    trainer.on_train_start()
    trainer.look = RandomIntensity(1.0)
    seen, batch = {}, make_batch(trainer, 2)
    kept = copy.deepcopy(batch)
    trainer.network.register_forward_pre_hook(lambda m, args: seen.update(data=args[0]))
    assert np.isfinite(trainer.train_step(batch)["loss"])
    assert not torch.equal(seen["data"], batch["data"]) and torch.equal(batch["data"], kept["data"])
    assert all(torch.equal(one, two) for one, two in zip(batch["target"], kept["target"], strict=True))
    assert trainer.diagnostic_keys == [] and trainer.extra_state() == {}
    run_epochs(trainer, 1)
