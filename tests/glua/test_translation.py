"""GLUA's translation: networks, losses, averages, styles, its pretraining stage, and that shapes do not move."""

import copy

import numpy as np
import pytest
import torch
from distributed import run_two_processes
from torch import nn

from nnunet_l2g.architectures.glua.translation import stage as stage_module
from nnunet_l2g.architectures.glua.translation import translator as translator_module
from nnunet_l2g.architectures.glua.translation.losses import (
    WEIGHTS,
    discriminator_loss,
    generate,
    generator_losses,
    head_targets,
    segmentation_loss,
)
from nnunet_l2g.architectures.glua.translation.networks import score_groups
from nnunet_l2g.architectures.glua.translation.stage import TranslationStage, learning_rate, linear_decay
from nnunet_l2g.architectures.glua.translation.structure_loss import measure_shift, structure_loss
from nnunet_l2g.architectures.glua.translation.translator import Translator, halvings_of
from nnunet_l2g.errors import UserError
from nnunet_l2g.phantom import make_case
from nnunet_l2g.training import stages
from nnunet_l2g.training.stages import run_stage

torch.set_num_threads(1)
CPU = torch.device("cpu")
TINY = {"width": 2, "num_styles": 3}


def make(channels=1, dims=2, seed=0, **options):
    torch.manual_seed(seed)
    return Translator(channels, dims, **{**TINY, **options})


def with_styles(translator, seed=0):
    codes = torch.randn(40, translator.target_styles.shape[1], generator=torch.Generator().manual_seed(seed))
    translator.set_target_styles(codes)
    return translator


def make_stage(translator, epochs=2, iterations=2, **options):
    return TranslationStage(translator, CPU, epochs, iterations, 1, {"fold": 0}, **{"slices": 3, **options})


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batches(dims=2, channels=1, size=16, seed=1, batch=3):
    shape = (batch, channels, *([4] * (dims - 2)), size, size)
    generator = torch.Generator().manual_seed(seed)
    while True:
        source, target = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator).square()
        yield {"data": source, "unlabelled": target, "target": [(source[:, :1] > 0).short()], "keys": ["a"]}


def run(folder, stage, network, source, log=print, **options):
    run_stage(stage, network, lambda: next(source), lambda: next(batches(stage.module.dims)), str(folder), log, **options)


def phantoms(seeds, contrast, size=48, normalise=True):
    """(B, 1, H, W) near mid-heart, each case normalised by its own mean and deviation, or in scanner units."""
    import SimpleITK

    images = [make_case(seed, contrast, size=(size, size), spacing=(115.2 / size,) * 2)[0] for seed in seeds]
    stack = torch.stack([torch.from_numpy(SimpleITK.GetArrayFromImage(i).astype(np.float32)) for i in images])[:, None]
    return (stack - stack.mean((2, 3), keepdim=True)) / stack.std((2, 3), keepdim=True) if normalise else stack


@pytest.fixture(autouse=True)
def no_figures(monkeypatch, request):
    """progress_translation.png is drawn by run_stage, slowly, and tested with it."""
    if "draws" not in request.node.name:
        monkeypatch.setattr(stages, "draw_diagnostics", lambda *_: None)


# ---- networks and use ----


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("patch", [(37, 45), (5, 7), (3, 19, 30)], ids=str)
def test_translations_have_the_patchs_shape(channels, patch):
    translator = with_styles(make(channels, len(patch), halvings=1 + channels % 2))
    x = noise(2, channels, *patch)
    styles = translator.draw_styles(2)
    y = translator.translate(x, styles)
    assert y.shape == x.shape and y.dtype == x.dtype and torch.isfinite(y).all() and not y.requires_grad


def test_translations_are_deterministic_and_by_the_averaged_weights():
    translator, x = with_styles(make()), noise(2, 1, 24, 24)
    styles = translator.draw_styles(2)
    first = translator.translate(x, styles)
    translator.train()
    assert torch.equal(first, translator.translate(x, styles))
    before = [p.clone() for p in translator.average.parameters()]
    with torch.no_grad():
        for parameter in translator.generator.parameters():
            parameter.add_(1)
    assert torch.equal(first, translator.translate(x, styles))
    translator.update_average(0.75)
    for one, other in zip(translator.average.parameters(), before, strict=True):
        torch.testing.assert_close(one, other + 0.25)
    assert not torch.equal(first, translator.translate(x, styles))


def test_one_style_for_all_slices_of_a_sample_and_each_sample_its_own():
    translator, x = with_styles(make(dims=3)), noise(2, 1, 3, 16, 16)
    styles = translator.target_styles[:2]
    y = translator.translate(x, styles)
    two = Translator(1, 2, **TINY)
    two.load_state_dict(translator.state_dict())
    for sample in range(2):
        for depth in range(3):
            alone = two.translate(x[sample, :, depth][None], styles[sample][None])[0]
            torch.testing.assert_close(y[sample, :, depth], alone)


# ---- shapes do not move ----


class Copy(nn.Module):
    """Content is the image itself; decoded darker or brighter by the style's first number, moved by its second."""

    def forward(self, x, style=None):
        if style is None:
            return x.repeat(1, 4, 1, 1)
        moved = [torch.roll(image, int(code[1]), 2) for image, code in zip(x[:, :1], style, strict=True)]
        return torch.stack(moved) * (1 + style[:, :1, None, None])


class Constant(nn.Module):
    def __init__(self, *code):
        super().__init__()
        self.code = torch.tensor(code)

    def forward(self, x):
        return self.code.expand(len(x), -1)


def test_an_invertible_shift_leaves_the_cycle_unhurt_and_is_found_by_structure_and_shift():
    """The trap: towards the target by 3 pixels to the right, back by 3 to the left."""
    cine = phantoms(range(3), "cine")
    found = {}
    for by in (0.0, 3.0):
        translator = make(width=1, style_dim=2)
        generator = translator.generator
        generator.content, generator.decoder = Copy(), Copy()
        generator.styles = nn.ModuleDict({"source": Constant(0.0, 0.0), "target": Constant(0.0, by)})
        images = generate(translator, cine, cine)
        images = images._replace(tt=cine, ss=cine)
        back = generator.decoder(generator.content(images.st), torch.tensor([[0.0, -by]]).expand(3, -1))
        losses = generator_losses(translator, images)
        numbers = stage_module._numbers(images, losses, losses["cycle"], losses["cycle"])
        found[by] = float((back - cine).abs().mean()), float(losses["structure"]), numbers["shift"]
    assert found[0.0][0] == found[3.0][0] == 0
    assert found[0.0][1] < 1e-4 and found[3.0][1] > 0.4
    assert found[0.0][2] == 0 and found[3.0][2] == 3


# ---- losses and gradients ----


def test_cycle_content_and_segmentation_give_translations_no_gradient():
    """They teach encoder and decoder from translations. A gradient would reward translations that hide the source."""
    translator = make(segmentation=1).requires_grad_(True)
    known, maps = torch.ones(3, 1, 16, 16), torch.Generator().manual_seed(0)
    images = generate(translator, noise(3, 1, 16, 16), noise(3, 1, 16, 16, seed=1), maps)
    losses = generator_losses(translator, images, maps, known, known)
    assert losses.keys() == WEIGHTS.keys()
    for made in (images.st, images.ts):
        gradients = {k: torch.autograd.grad(v, made, retain_graph=True, allow_unused=True)[0] for k, v in losses.items()}
        reached = {key for key, value in gradients.items() if value is not None and value.abs().max() > 0}
        assert reached == {"style", "adversarial", "structure"}


def test_content_is_encoded_along_random_maps_in_training_only():
    translator, x = make(), noise(2, 1, 16, 16)
    first, second = (generate(translator, x, x, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(first.content_s, second.content_s) and torch.equal(first.style_s, second.style_s)
    images = generate(translator, x, x)
    assert torch.equal(images.content_s, translator.generator.content(torch.cat([x, x])).chunk(2)[0])


@pytest.mark.parametrize(("dims", "channels", "segmentation", "halvings"), [(2, 1, 0, 2), (2, 3, 2, 1), (3, 2, 1, 1)])
def test_every_parameter_gets_a_finite_gradient_from_its_own_loss(dims, channels, segmentation, halvings):
    translator = make(channels, dims, segmentation=segmentation, halvings=halvings)
    stage = make_stage(translator)
    stage.begin()
    source, target, labels, maps = stage._choose_slices(next(batches(dims, channels)), 0)
    images = generate(translator, source, target, maps)
    discriminator_loss(translator, images).backward()
    assert all(p.grad is None for p in translator.generator_parameters())
    for name, parameter in translator.named_parameters():
        if "discriminator" in name:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            parameter.grad = None
    sum(WEIGHTS[key] * value for key, value in generator_losses(translator, images, maps, *labels).items()).backward()
    expected = sum(1 for _ in translator.generator_parameters())
    counted = 0
    for name, parameter in translator.named_parameters():
        if name.startswith("average."):
            assert parameter.grad is None and not parameter.requires_grad
        elif "discriminator" not in name:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
            counted += 1
    assert counted == expected > 30


def test_groups_have_the_scores_and_gradients_of_separate_passes():
    """In eval mode, since each pass in training moves the vectors of the spectral norm."""
    discriminator = make().eval().image_discriminators["target"].requires_grad_(True)
    groups = [noise(2, 1, 24, 16, seed=n).requires_grad_() for n in range(3)]
    parameters = [*groups, *discriminator.parameters()]
    together, alone = score_groups(discriminator, *groups), [discriminator(group) for group in groups]
    gradients = []
    for way in (together, alone):
        total = sum((n + 1) * (score - 0.3).square().mean() for n, scores in enumerate(way) for score in scores)
        gradients.append(torch.autograd.grad(total, parameters))
    for a, b in zip([s for scores in together for s in scores], [s for scores in alone for s in scores], strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_half_precision_trains(monkeypatch, tmp_path):
    """On the CPU, where it is off by default; what a GPU does, up to its kernels."""
    for module in (stage_module, translator_module):
        monkeypatch.setattr(module, "bfloat16_where_possible", lambda device: torch.autocast("cpu", dtype=torch.bfloat16))
    translator = make(dims=3, segmentation=1)
    lines = []
    run(tmp_path, make_stage(translator, folder=tmp_path), translator, batches(3), lines.append)
    assert len(lines) >= 2 and {v.dtype for v in translator.state_dict().values()} == {torch.float32, torch.bool}
    assert all(torch.isfinite(v).all() for v in translator.state_dict().values())
    x = noise(1, 1, 2, 17, 16)
    assert translator.translate(x, translator.draw_styles(1)).dtype == torch.float32


def test_targets_of_the_head_for_labels_regions_and_the_ignored():
    labels = torch.tensor([[0, 1], [2, 3]]).view(1, 1, 2, 2)
    targets, known = head_targets(labels, 2, ignore_label=3)
    assert targets[0].tolist() == [[[0, 1], [0, 0]], [[0, 0], [1, 0]]] and known[0, 0].tolist() == [[1, 1], [1, 0]]
    regions = torch.stack([labels[:, 0] > 0, labels[:, 0] == 2, labels[:, 0] == 3], 1)
    targets, known = head_targets(regions, 2)
    assert torch.equal(targets, regions[:, :2].float()) and known[0, 0].tolist() == [[1, 1], [1, 0]]
    assert torch.equal(head_targets(regions, 3)[0], regions.float())


def test_unknown_voxels_do_not_count_in_the_segmentation():
    logits, labels = noise(2, 2, 8, 8), (noise(2, 2, 8, 8, seed=1) > 0).float()
    known = torch.ones(2, 1, 8, 8)
    known[..., 4:] = 0
    other = logits.clone()
    other[..., 4:] = 100.0
    assert segmentation_loss(logits, labels, known) == segmentation_loss(other, labels, known)
    assert segmentation_loss(20 * (2 * labels - 1), labels, known) < 1e-3
    assert torch.isfinite(segmentation_loss(logits, labels, 0 * known))


# ---- averages and styles ----


def test_styles_are_the_clusters_of_the_targets_codes():
    translator = make()
    centres = 10 * noise(3, 8)
    translator.set_target_styles((centres[:, None] + 0.01 * noise(3, 30, 8, seed=1)).view(-1, 8))
    distances = torch.cdist(centres, translator.target_styles)
    assert (distances.min(1).values < 0.05).all() and (distances.min(0).values < 0.05).all()
    torch.manual_seed(0)
    drawn = translator.draw_styles(300)
    counts = [(drawn == style).all(1).sum() for style in translator.target_styles]
    assert drawn.shape == (300, 8) and sum(counts) == 300 and min(counts) > 60


def test_a_short_training_takes_larger_steps_and_the_rate_falls_over_the_last_part():
    assert [learning_rate(steps) for steps in (1, 1600, 4000, 8000, 100_000)] == pytest.approx([1e-3, 1e-3, 4e-4, 2e-4, 2e-4])
    assert [linear_decay(s, 10, 0.4) for s in (0, 6, 8, 9)] == [1.0, 1.0, 0.5, 0.25]
    stage = make_stage(make(), epochs=5, lr=1e-3)
    stage.begin()
    source, rates = batches(), []
    for _ in range(10):
        stage.train_step(next(source))
        rates.append(stage.generator_optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3] * 7 + [7.5e-4, 5e-4, 2.5e-4])


# ---- the stage ----


def test_the_stage_freezes_places_styles_and_draws(tmp_path):
    translator = make(channels=3, dims=3, segmentation=1)
    stage = make_stage(translator, folder=tmp_path)
    source = batches(3, 3)
    lines = []
    run_stage(stage, translator, lambda: next(source), lambda: next(source), str(tmp_path), lines.append)
    assert not any(p.requires_grad or p.grad is not None for p in translator.parameters()) and not translator.training
    assert len(translator.target_styles.unique(dim=0)) == 3 and stage.generator_optimizer is None
    assert (tmp_path / "translation.png").stat().st_size > 1000
    assert (tmp_path / "progress_translation.png").is_file() and len([x for x in lines if "of 2: train_generator" in x]) == 2
    other = make(channels=3, dims=3, segmentation=1, seed=5)  # a finished stage is taken as it is, styles too
    run_stage(make_stage(other), other, None, None, str(tmp_path), lines.append, resume=True)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in translator.state_dict().items())


def test_another_translators_checkpoint_is_refused(tmp_path):
    translator = make()
    run(tmp_path, make_stage(translator), translator, batches())
    other = make(width=3)
    with pytest.raises(UserError, match="translator_width: there 2, here 3"):
        run(tmp_path, make_stage(other), other, batches(), resume=True)
    file = tmp_path / "stage_translation.pth"
    older = torch.load(file, weights_only=True)
    older["settings"]["translation_form"] = 2
    torch.save(older, file)
    with pytest.raises(UserError, match="translation_form: there 2, here 3"):
        run(tmp_path, make_stage(translator), translator, batches(), resume=True)


def test_a_large_shift_warns():
    translator, lines = with_styles(make()), []
    stage = make_stage(translator)
    stage.style_codes = [noise(9, 8)]
    stage.end_epoch(1, {"validation_shift": 2.5}, lines.append)
    assert len(lines) == 1 and lines[0].startswith("WARNING: the translation moves edges by 2.5 pixels")
    stage.end_epoch(1, {"validation_shift": 0.5}, lines.append)
    assert len(lines) == 1


def test_small_slices_are_halved_once():
    assert [halvings_of(patch) for patch in ((40, 40), (8, 96, 95), (96, 112, 112))] == [1, 1, 2]


def _trained(rank, folder):
    stages.draw_diagnostics = lambda *_: None
    translator = make(seed=rank)  # other weights at the start: rank 0's are taken
    stage = make_stage(translator)
    source = batches(seed=rank + 1)
    run_stage(stage, translator, lambda: next(source), lambda: next(batches()), folder, lambda line: None, rank=rank)
    return copy.deepcopy(translator.state_dict())


@pytest.mark.slow
def test_two_processes_keep_equal_weights(tmp_path):
    first, second = run_two_processes(_trained, str(tmp_path))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    translator, source = make(), batches(seed=1)
    run(tmp_path, make_stage(translator), translator, source)
    alone = translator.state_dict()
    assert not torch.equal(alone["generator.decoder.up.0.weight"], first["generator.decoder.up.0.weight"])


@pytest.mark.slow
def test_a_short_training_brings_intensities_to_the_targets_and_leaves_edges_in_place(tmp_path):
    """Cine to late enhancement, no subject in both, intensities in the source's units (as with CT's normalisation).

    Held-out hearts exist in both contrasts, so the translation has a true answer, which the training never sees.
    """
    cine, late = phantoms(range(24), "cine", 32, False), phantoms(range(100, 124), "late_enhancement", 32, False)
    held, truth = phantoms(range(200, 212), "cine", 32, False), phantoms(range(200, 212), "late_enhancement", 32, False)
    mean, deviation = cine.mean(), cine.std()
    cine, late, held, truth = ((x - mean) / deviation for x in (cine, late, held, truth))
    generator = torch.Generator().manual_seed(0)

    def batch():
        chosen = torch.randint(24, (2, 4), generator=generator)
        return {"data": cine[chosen[0]], "unlabelled": late[chosen[1]]}

    translator = make(width=8, num_styles=6, halvings=halvings_of(cine.shape[2:]))
    stage = TranslationStage(translator, CPU, 2, 60, 1, {}, slices=4, lr=2e-3)
    run_stage(stage, translator, batch, batch, str(tmp_path), print)
    torch.manual_seed(0)
    translated = translator.translate(held, translator.draw_styles(len(held)))

    def distance(x):
        from scipy.stats import wasserstein_distance

        return wasserstein_distance(x.flatten().numpy(), late.flatten().numpy())

    before, after = distance(held), distance(translated)
    assert after < before / 2, f"{before:.3f} to {after:.3f}"
    assert (translated - truth).abs().mean() < 0.5 * (held - truth).abs().mean()
    assert not measure_shift(held, translated).any()
    assert structure_loss(held, translated) < 0.5 * structure_loss(held, torch.roll(held, 3, 3))
