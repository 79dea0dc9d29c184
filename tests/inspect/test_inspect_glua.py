"""What `nnunet_l2g inspect` shows of GLUA and its twins, and how it takes an image of either domain."""

import json

import numpy as np
import pytest
import torch
from test_inspect import check_files, inspect, read_map, read_summary
from tiny_model import make_plans, open_model, write_case, write_model

from nnunet_l2g.architectures.glua.alignment import DomainDiscriminator
from nnunet_l2g.architectures.glua.translation.translator import Translator, halvings_of
from nnunet_l2g.inspect import inspection
from nnunet_l2g.inspect.case import read_case
from nnunet_l2g.inspect.domains import TARGET_KEY, plans_for_domain
from nnunet_l2g.inspect.glua import EXTRA_KEY, load_parts, translate_case

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


GAP = {key: [np.float64(0.5), np.float64(0.25)] for key in ("gap_intensity", "gap_intensity_translated", "gap_features")}


@pytest.mark.parametrize("dims", [2, 3])
def test_glua_translates_a_source_image_and_masks(tmp_path, dims):
    state = extra_state(dims)
    model = write_model(tmp_path, "nnUNetTrainerGLUA", adapted(dims), **{EXTRA_KEY: state}, logging=GAP)
    image, label = write_case(tmp_path / "in", spacing=(4.0, 2.0, 2.0))
    assert inspect(model, image, tmp_path / "out", label=label) == 0
    files = check_files(tmp_path / "out", image)
    assert {f"translation_{style}.nii.gz" for style in range(1, 7)} | {"mask.nii.gz", "mask_translated.nii.gz"} < set(files)
    assert {"translations.png", "mask.png", "gap.png"} < set(files)
    found = read_summary(tmp_path / "out")["glua"]
    assert found["domain"] == "source" and found["notes"] == [] and len(found["translation"]) == 6
    assert found["gap"]["gap_intensity"] == {"first": 0.5, "last": 0.25, "epochs": [0.5, 0.25]}
    assert 0 < found["mask"]["image"]["mean_mask"] < 1 and set(found["mask"]["image"]["structures"]) == {"organ", "lesion"}
    mask = read_map(tmp_path / "out/mask.nii.gz")
    assert found["mask"]["image"]["structures"]["organ"]["mask"] == pytest.approx(mask[read_map(label) == 1].mean(), abs=1e-4)
    opened = open_model(model, plans_of=lambda plans, name: plans_for_domain(plans, name, None)[0])
    case = read_case(opened, [image], None)
    assert abs(case.data.mean()) < 0.05  # z-scores, the source's normalisation
    translator, _, _, missing = load_parts(opened)
    assert not missing and torch.equal(translator.target_styles, state["translator"]["target_styles"])
    expected = translate_case(translator, case.data, translator.target_styles[1], "cpu")
    inside = tuple(slice(*bounds) for bounds in case.properties["bbox_used_for_cropping"])
    assert np.allclose(read_map(tmp_path / "out/translation_2.nii.gz")[inside], expected[0], atol=1e-4)
    for index in (0, 3, 9):  # either way slice by slice
        plane = torch.from_numpy(case.data[:, index])[None]  # (1, C, H, W)
        one = translator.translate(plane if dims == 2 else plane[:, :, None], translator.target_styles[1:2])
        assert np.allclose(one.reshape(expected.shape[2:]), expected[0, index], atol=1e-4)


def test_a_target_image_is_normalised_as_such_and_not_translated(tmp_path):
    model = write_model(tmp_path, "nnUNetTrainerGLUA", adapted(), **{EXTRA_KEY: extra_state()}, logging=GAP)
    image, _ = write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out", "--domain", "target") == 0
    files = check_files(tmp_path / "out", image)
    assert "mask.png" in files and "translations.png" not in files and "mask_translated.nii.gz" not in files
    case = read_case(open_model(model), [image], None)
    clipped = np.clip(case.image, 50, 350)  # CT normalisation with the plans' intensities
    assert case.data.max() == pytest.approx((clipped.max() - 200) / 50, abs=0.2)


def test_a_stripped_checkpoint_is_said_to_be(tmp_path, capsys):
    model, (image, _) = write_model(tmp_path, "nnUNetTrainerGLUA", adapted()), write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out") == 0
    assert "has no translator and no domain discriminator" in capsys.readouterr().out
    summary = read_summary(tmp_path / "out")
    assert set(summary["files"]) == {"prediction.nii.gz", "segmentation.png", "summary.json"}
    assert "checkpoint_final.pth has no translator" in summary["glua"]["notes"][0]


@pytest.mark.parametrize(
    ("trainer", "has", "lacks"),
    [
        ("nnUNetTrainerGLUANoTranslation", "mask.png", "translations.png"),
        ("nnUNetTrainerGLUATranslationOnly", "translations.png", "mask.png"),
        ("nnUNetTrainerGLUANoMask", "mask.png", "nothing"),
    ],
)
def test_gluas_twins(tmp_path, trainer, has, lacks):
    kept = {"mask.png": "alignment", "translations.png": "translator"}
    state = {key: value for key, value in extra_state().items() if key != kept.get(lacks)}
    model, (image, _) = write_model(tmp_path, trainer, adapted(), **{EXTRA_KEY: state}), write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out") == 0
    files = read_summary(tmp_path / "out")["files"]
    assert has in files and lacks not in files
    assert read_summary(tmp_path / "out")["glua"]["notes"] == []


def test_an_image_of_the_source_is_inverted_for_a_network_that_was_trained_so(tmp_path, monkeypatch):
    seen = []
    predict = inspection.predict
    monkeypatch.setattr(inspection, "predict", lambda model, case, on: seen.append(case.data) or predict(model, case, on))
    image, _ = write_case(tmp_path / "in")
    for inverted, domain in ((False, "source"), (True, "source"), (True, "target")):
        state = {"inverted": torch.tensor([inverted])}
        out = tmp_path / f"{domain}{inverted}"
        model = write_model(out, "nnUNetTrainerGLUAInversionOnly", adapted(), **{EXTRA_KEY: state})
        assert inspect(model, image, out / "out", "--domain", domain) == 0
        found = read_summary(out / "out")["glua"]
        assert found.get("inverted") == (None if domain == "target" else [inverted])
    assert np.array_equal(seen[1], -seen[0])
    target = read_case(open_model(model), [image], None)
    assert np.array_equal(seen[2], target.data)


def test_a_checkpoint_without_its_inverted_channels_is_refused(tmp_path, capsys):
    model, (image, _) = write_model(tmp_path, "nnUNetTrainerGLUAInversionOnly", adapted()), write_case(tmp_path / "in")
    assert inspect(model, image, tmp_path / "out") == 1 and not (tmp_path / "out").exists()
    assert "does not say which channels of the source are inverted" in capsys.readouterr().err
    assert inspect(model, image, tmp_path / "out", "--domain", "target") == 0
    assert "has no list of inverted channels" in capsys.readouterr().out
    for number, wrong in enumerate((torch.ones(2).bool(), torch.ones(1), [True], torch.ones(1, 1).bool())):
        state = {EXTRA_KEY: {"inverted": wrong}}
        model = write_model(tmp_path / str(number), "nnUNetTrainerGLUAInversionOnly", adapted(), **state)
        assert inspect(model, image, tmp_path / "refused") == 1
        assert "do not fit nnUNetTrainerGLUAInversionOnly, expected 1 of True or False" in capsys.readouterr().err


def test_parts_of_another_model_are_refused(tmp_path, capsys):
    for part, entry in (("translator", {"translator": {"target_styles": torch.zeros(3, 8)}}),
                        ("domain discriminator", {"alignment": {"discriminator": {}}})):  # fmt: skip
        state = extra_state() | entry
        model = write_model(tmp_path / part, "nnUNetTrainerGLUA", adapted(), **{EXTRA_KEY: state})
        image, _ = write_case(tmp_path / "in")
        assert inspect(model, image, tmp_path / part / "out") == 1
        assert f"its {part} does not fit" in capsys.readouterr().err
        assert not (tmp_path / part / "out").exists()


def test_a_source_with_ct_normalisation_needs_its_plans(tmp_path, monkeypatch):
    from nnunet_l2g.errors import UserError

    plans = adapted(target="ZScoreNormalization", source="CTNormalization")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    with pytest.raises(UserError, match=r"sourcePlans.json.*--domain target"):
        plans_for_domain(plans, "2d", None)
    own = {"foreground_intensity_properties_per_channel": {"0": {"mean": 1.0}}}
    (tmp_path / "Dataset990_Tiny").mkdir()
    (tmp_path / "Dataset990_Tiny" / "sourcePlans.json").write_text(json.dumps(own))
    made, domain = plans_for_domain(plans, "2d", None)
    assert domain == "source" and made["foreground_intensity_properties_per_channel"] == {"0": {"mean": 1.0}}
    assert made["configurations"]["2d"]["normalization_schemes"] == ["CTNormalization"]
    assert plans["configurations"]["2d"]["normalization_schemes"] == ["ZScoreNormalization"]
    assert plans_for_domain(plans, "2d", "target") == (plans, "target")


def test_names_of_the_layers_above():
    from nnunet_l2g.trainers import base

    assert EXTRA_KEY == base.EXTRA_KEY
