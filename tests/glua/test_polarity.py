"""Which channels of the source are turned over before they are translated, and that nothing else of the translation changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from nnunet_l2g.architectures.glua import polarity as module
from nnunet_l2g.architectures.glua.polarity import Polarity, measure_polarity
from nnunet_l2g.architectures.glua.translation import TranslationStage, Translator
from nnunet_l2g.architectures.glua.translation.content_view import ContentView
from nnunet_l2g.architectures.glua.translation.losses import generate
from nnunet_l2g.phantom import make_case


class Cases:
    """As nnU-Net's datasets: names, and images (C, Z, Y, X) by name; segmentations that must not be touched."""

    def __init__(self, images):
        self.images = {f"case_{n:03d}": image for n, image in enumerate(images)}
        self.identifiers = list(self.images)

    def load_case(self, name):
        return self.images[name], None, None, {}


def skewed(number, channels=1, seed=0, side=24):
    """Mean 0, deviation 1, a long tail of bright voxels."""
    values = np.random.default_rng(seed).exponential(size=(number, channels, 3, side, side)) - 1
    return values.astype(np.float32)


def hearts(seeds, contrast):
    import SimpleITK

    images = [SimpleITK.GetArrayFromImage(make_case(s, contrast, size=(40, 40, 8), spacing=(2.9, 2.9, 10.0))[0]) for s in seeds]
    return Cases([((image - image.mean()) / image.std())[None] for image in images])


def test_distances_are_those_of_the_whole_images(monkeypatch):
    """Enough voxels drawn: near scipy on all of them; other seeds, nearly the same."""
    source, target = skewed(6), -skewed(5, seed=1)
    whole = [wasserstein_distance(sign * source.ravel(), target.ravel()) for sign in (1, -1)]
    for seed in range(3):
        (found,) = measure_polarity(Cases(source), Cases(target), seed)
        np.testing.assert_allclose(found, whole, atol=0.04)
    assert measure_polarity(Cases(source), Cases(target)) == measure_polarity(Cases(source), Cases(target))
    monkeypatch.setattr(module, "CASES", 2)  # reads no more cases than that
    read = Cases(source)
    original, names = read.load_case, []
    read.load_case = lambda name: names.append(name) or original(name)
    measure_polarity(read, Cases(target))
    assert len(names) == 2


def test_each_channel_is_turned_for_itself():
    source = skewed(8, 3)
    target = skewed(8, 3, seed=1) * np.array([1, -1, 1], dtype=np.float32)[:, None, None, None]
    assert [found.sign for found in measure_polarity(Cases(source), Cases(target))] == [1, -1, 1]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.5, 2), st.floats(-0.5, 0.5))
def test_turning_the_source_changes_the_distances_places(seed, scale, location):
    source, target = Cases(skewed(3, seed=seed)), Cases(scale * skewed(3, seed=seed + 1) + location)
    ((as_it_is, turned),) = measure_polarity(source, target)
    assert measure_polarity(Cases([-x for x in source.images.values()]), target) == [(turned, as_it_is)]


def test_doubt_leaves_a_channel_as_it_is():
    assert Polarity(1.0, 0.76).sign == 1 and Polarity(1.0, 0.74).sign == -1
    assert Polarity(0.0, 0.0).sign == 1
    assert Polarity(0.04, 0.0).sign == 1 and Polarity(0.06, 0.0).sign == -1  # equal domains are not at 0 either


def test_equal_symmetric_domains_are_not_turned():
    """Nothing to tell the sign by: both distances are the draw's, either may be half of the other, both are far too small."""
    for seed in range(8):
        noise = np.random.default_rng(seed).standard_normal((40, 1, 4, 40, 40))
        (found,) = measure_polarity(Cases(noise[:20]), Cases(noise[20:]))
        assert found.sign == 1 and max(found) < module.WORTH_IT / 2


@pytest.mark.parametrize("contrast", ["cine", "black_blood", "late_enhancement"])
def test_dark_air_in_both_domains_speaks_against_it(contrast):
    """Blood is bright in cine and dark in black blood, and still the whole image is not the other's negative."""
    (found,) = measure_polarity(hearts(range(6), "cine"), hearts(range(20, 26), contrast))
    assert found.sign == 1 and found.turned > 2 * found.as_it_is


def make(channels=2, dims=2):
    torch.manual_seed(0)
    return Translator(channels, dims, width=2, num_styles=3).eval()


@pytest.mark.parametrize("dims", [2, 3])
def test_a_turned_channel_goes_in_turned_and_comes_out_as_the_source_has_it(dims):
    translator = make(dims=dims)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, *[5] * (dims - 2), 16, 20, generator=generator)
    styles = torch.randn(2, 8, generator=generator)
    over = x * torch.tensor([1.0, -1.0]).view(1, 2, *[1] * dims)
    forward, back = translator.translate(x, styles), translator.translate_back(x, styles)
    of_source, of_target = (translator.encode_style(x, domain) for domain in ("source", "target"))
    assert torch.equal(translator.turn(over), over)
    translator.polarity[1] = -1
    assert torch.equal(translator.turn(x), over) and torch.equal(translator.turn(over), x)
    assert torch.equal(translator.translate(over, styles), forward)
    assert torch.equal(translator.encode_style(over, "source"), of_source)
    assert torch.equal(translator.encode_style(x, "target"), of_target)
    turned_back = translator.translate_back(x, styles)
    assert torch.equal(translator.turn(turned_back), back) and not torch.equal(turned_back, back)
    assert translator.turn(x.bfloat16()).dtype == torch.bfloat16


def test_the_stage_trains_on_the_turned_source_and_on_the_target_as_it_is():
    seen = []
    batch = {"data": torch.full((2, 2, 16, 16), 3.0), "unlabelled": torch.full((2, 2, 16, 16), 5.0)}
    for sign in (1, -1):
        translator = make()
        translator.polarity[0] = sign
        stage = TranslationStage(translator, torch.device("cpu"), 1, 1, 1, {}, slices=2)
        stage.begin()
        source, target, *_ = stage._images(batch, 0)
        assert generate(translator, source, target, ContentView()).s is source
        seen.append([round(float(x[:, c].mean())) for x in (source, target) for c in range(2)])
    assert seen == [[3, 3, 5, 5], [-3, 3, 5, 5]]
