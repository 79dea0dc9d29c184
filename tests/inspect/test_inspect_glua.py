"""What `nnunet_l2g inspect` shows of GLUA and its ablations, and how it takes an image of either domain."""

import json

import numpy as np
import pytest
import torch
from test_inspect import SEGMENTATION, check_files, inspect, read_map, read_summary
from tiny_model import make_plans, open_model, write_case, write_model

from nnunet_l2g.architectures.glua.alignment import DomainDiscriminator
from nnunet_l2g.architectures.glua.translation.translator import Translator, halvings_of
from nnunet_l2g.errors import UserError
from nnunet_l2g.inspect.case import read_case
from nnunet_l2g.inspect.glua import EXTRA_KEY, as_trained_on, load_trainer_state, translate_case
from nnunet_l2g.inspect.model import TARGET_KEY, plans_for_domain

torch.set_num_threads(1)


def adapted(dims=2, target="CTNormalization", source="ZScoreNormalization"):
    plans = make_plans((8, 32, 32)[-dims:], (4.0, 2.0, 2.0)[-dims:], schemes=(target,))
    (name,) = plans["configurations"]
    entry = {"source_normalization_schemes": [source], "source_use_mask_for_norm": [False]}
    return plans | {TARGET_KEY: {"source_plans_name": "sourcePlans", "configurations": {name: entry}}}


def extra_state(dims=2):
    """What GLUA's trainer keeps beside the network, untrained, with styles that differ."""
    torch.manual_seed(0)
    translator = Translator(1, dims, segmentation=2, halvings=halvings_of((32, 32)))
    translator.target_styles.normal_()
    weights = {key: value for key, value in translator.state_dict().items() if key.startswith(("average.", "target_styles"))}
    discriminator = DomainDiscriminator(32, dims)
    torch.nn.init.normal_(discriminator.layers[-1].weight)
    return {"translator": weights, "alignment": {"discriminator": discriminator.state_dict(), "optimizer": {}}}


TRANSLATIONS = {"translations.png", *(f"translation_{style}.nii.gz" for style in range(1, 7))}
MASK = {"mask.png", "mask.nii.gz"}


@pytest.mark.parametrize("dims", [2, 3])
def test_glua_translates_a_source_image_and_shows_the_mask(tmp_path, dims):
    model = write_model(tmp_path, "nnUNetTrainerGLUA", adapted(dims), **{EXTRA_KEY: extra_state(dims)})
    image, label = write_case(tmp_path / "in", spacing=(4.0, 2.0, 2.0))
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    assert check_files(tmp_path / "out", image) == TRANSLATIONS | MASK | SEGMENTATION | {"errors.nii.gz"}
    summary = read_summary(tmp_path / "out")
    assert summary["domain"] == "source" and 0 < summary["glua"]["mean_mask"] < 1
    opened = open_model(model)
    case = read_case(opened, [image], None)
    assert abs(case.data.mean()) < 0.05  # z-scores, the source's normalisation
    translator = load_trainer_state(opened).translator
    expected = translate_case(translator, case.data, translator.target_styles[1], "cpu")
    inside = tuple(slice(*bounds) for bounds in case.properties["bbox_used_for_cropping"])
    assert np.allclose(read_map(tmp_path / "out/translation_2.nii.gz")[inside], expected[0], atol=1e-4)


@pytest.mark.parametrize(
    ("trainer", "domain", "parts", "files"),
    [
        ("nnUNetTrainerGLUA", "target", {"alignment", "translator"}, MASK),
        ("nnUNetTrainerGLUANoTranslation", "source", {"alignment"}, MASK),
        ("nnUNetTrainerGLUATranslationOnly", "source", {"translator"}, TRANSLATIONS),
        ("nnUNetTrainerGLUA", "source", set(), set()),  # another program has removed what prediction does not need
    ],
)
def test_what_fits_the_domain_and_the_checkpoint_is_shown(tmp_path, capsys, trainer, domain, parts, files):
    state = {key: value for key, value in extra_state().items() if key in parts}
    model, (image, _) = write_model(tmp_path, trainer, adapted(), **{EXTRA_KEY: state}), write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out", "--domain", domain) == 0
    assert check_files(tmp_path / "out", image) == files | SEGMENTATION
    assert ("checkpoint_final.pth has no translator" in capsys.readouterr().out) == (not parts)


def test_the_contrast_of_a_source_image_is_inverted_for_a_network_that_was_trained_so(tmp_path):
    image, _ = write_case(tmp_path / "in")
    state = {EXTRA_KEY: {"inverted": torch.tensor([True])}}
    folder = write_model(tmp_path, "nnUNetTrainerGLUAInversionOnly", adapted(), **state)
    for domain, sign in (("source", -1), ("target", 1)):
        model = open_model(folder, domain=domain)
        case = read_case(model, [image], None)
        assert np.array_equal(as_trained_on(model, load_trainer_state(model), case).data, sign * case.data)
    clipped = np.clip(case.image, 50, 350)  # the target has CT normalisation with the plans' intensities
    assert case.data.max() == pytest.approx((clipped.max() - 200) / 50, abs=0.2)
    assert inspect(folder, image, tmp_path / "out") == 0
    assert read_summary(tmp_path / "out")["glua"]["inverted"] == [True]


def test_parts_that_do_not_fit_are_refused(tmp_path):
    model = open_model(write_model(tmp_path, "nnUNetTrainerGLUAInversionOnly", adapted()))
    with pytest.raises(UserError, match="which channels of the source were inverted"):
        as_trained_on(model, load_trainer_state(model), read_case(model, [write_case(tmp_path / "in")[0]], None))
    for state in (
        {"translator": {"target_styles": torch.zeros(3, 8)}},
        {"alignment": {"discriminator": {}}},
        *({"inverted": wrong} for wrong in (torch.ones(2).bool(), torch.ones(1), [True], torch.ones(1, 1).bool())),
    ):
        model.checkpoint[EXTRA_KEY] = state
        with pytest.raises(UserError, match="kept beside the network does not fit nnUNetTrainerGLUAInversionOnly"):
            load_trainer_state(model)


def test_a_source_with_ct_normalisation_needs_its_plans(tmp_path, monkeypatch):
    plans = adapted(target="ZScoreNormalization", source="CTNormalization")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    with pytest.raises(UserError, match=r"sourcePlans.json.*--domain target"):
        plans_for_domain(plans, "2d", None)
    own = {"foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}}}
    (tmp_path / "Dataset990_Tiny").mkdir()
    (tmp_path / "Dataset990_Tiny" / "sourcePlans.json").write_text(json.dumps(own))
    made, domain = plans_for_domain(plans, "2d", None)
    assert domain == "source" and own.items() <= made.items()
    assert made["configurations"]["2d"]["normalization_schemes"] == ["CTNormalization"]
    assert plans_for_domain(plans, "2d", "target") == (plans, "target")
