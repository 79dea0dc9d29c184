"""Files of kinds that users of nnU-Net have reported: what its readers take is scored, in the unit that the files give."""

import functools
import gzip
import json
import re
import struct

import nibabel
import numpy as np
import pytest
import tifffile

from nnunet_l2g.cli import main
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.cases import Options, Pair, score_pairs, with_unit
from nnunet_l2g.evaluation.folders import segmentations
from nnunet_l2g.evaluation.labels import read_labels
from nnunet_l2g.images import check_whole

REFERENCE = np.zeros((5, 9, 9), np.uint8)  # (z, y, x)
REFERENCE[1:3, 2:6, 2:6] = 1
MASKS = {"ref": REFERENCE, "A": np.roll(REFERENCE, 1, 2), "B": np.roll(REFERENCE, 1, 1)}  # HD95: spacing of x, of y
SPACING = (3.0, 1.5, 1.0)


def describe(folder, ending, **more):
    content = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "box": 1}, "file_ending": ending, **more}
    (folder / "ref" / "dataset.json").write_text(json.dumps(content))


def write_tiff(folder, case="c", **spacing):
    """ref, A and B of one case, those named with a CASE.json beside them."""
    for side, mask in MASKS.items():
        (folder / side).mkdir(exist_ok=True)
        tifffile.imwrite(folder / side / f"{case}.tif", mask)
        if side in spacing:
            (folder / side / f"{case}.json").write_text(json.dumps({"spacing": spacing[side]}))
    describe(folder, ".tif")


def write_nifti(folder, case="c", affine=np.diag([1.0, 1.5, 3.0, 1.0]), sides=MASKS):
    for side in sides:
        (folder / side).mkdir(exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(MASKS[side].T, affine), folder / side / f"{case}.nii.gz")
    describe(folder, ".nii.gz")


def score(folder):
    """HD95 of A and B in the last case, the unit, and the warnings, as compare has them."""
    references = segmentations(folder / "ref", read_labels(folder / "ref" / "dataset.json").file_ending)
    labels = read_labels(folder / "ref" / "dataset.json", next(iter(references.values())))
    pairs = [Pair(side, case, path, folder / side / path.name) for case, path in references.items() for side in "AB"]
    labels, of_unit = with_unit(labels, pairs)
    scores, of_headers = score_pairs(pairs, labels, Options())
    last = max(references)
    values = tuple(scores[side, 1, last]["box"]["hd95"] for side in "AB")
    return values, "px" if labels.pixels else "mm", of_unit + of_headers


def test_a_corrected_spacing_of_tiff_changes_the_distances(tmp_path):
    write_tiff(tmp_path, **dict.fromkeys(MASKS, SPACING))
    assert score(tmp_path) == ((1.0, 1.5), "mm", [])
    write_tiff(tmp_path, **dict.fromkeys(MASKS, (30.0, 15.0, 10.0)))
    assert score(tmp_path) == ((10.0, 15.0), "mm", [])


def test_files_with_equal_bytes_that_point_to_other_voxels_keep_their_own_scores(tmp_path):
    for side, mask in MASKS.items():
        (tmp_path / side).mkdir()
        (tmp_path / side / "c.raw").write_bytes(mask.tobytes())
        (tmp_path / side / "c.nrrd").write_text(
            "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 9 9 5\nspacings: 1 1.5 3\nencoding: raw\ndata file: c.raw\n"
        )
    describe(tmp_path, ".nrrd")
    assert score(tmp_path)[0] == (1.0, 1.5)
    for one, other in (("A", "B"), ("B", "A")):
        (tmp_path / one / "c.raw").write_bytes(MASKS[other].tobytes())
    assert score(tmp_path)[0] == (1.5, 1.0)


@pytest.mark.parametrize("sides", ["A B", "ref"])
def test_the_spacing_of_the_side_that_has_one(tmp_path, sides):
    write_tiff(tmp_path, **dict.fromkeys(sides.split(), SPACING))
    values, unit, (warning,) = score(tmp_path)
    assert (values, unit) == ((1.0, 1.5), "mm")
    missing = tmp_path / ("ref" if sides == "A B" else "A") / "c.json"
    assert str(missing) in warning and "spacing of the other file of the pair" in warning


def test_without_any_spacing_all_distances_are_in_pixels(tmp_path, capsys):
    write_tiff(tmp_path)
    values, unit, (warning,) = score(tmp_path)
    assert (values, unit) == ((1.0, 1.0), "px") and "in pixels, not in mm" in warning
    assert compare(tmp_path, tmp_path / "out") == 0
    printed, page = capsys.readouterr().out, (tmp_path / "out" / "report.md").read_text()
    assert "HD95 [px]" in printed and "[px]" in page and "[mm]" not in page + printed
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["distance_unit"] == "px"


def compare(folder, output, home=None):
    named = [f"{side}={(home or folder)}/{side}" for side in "AB"]
    return main(["compare", "--predictions", *named, f"--reference={home or folder}/ref", "-o", str(output)])


def test_pixels_and_mm_are_not_averaged(tmp_path):
    write_tiff(tmp_path, "a", **dict.fromkeys(MASKS, SPACING))
    write_tiff(tmp_path, "b", A=SPACING)
    with pytest.raises(UserError, match=rf"{tmp_path}/ref/b.json: neither .* write the file"):
        score(tmp_path)


def rewrite(path, change):
    raw = bytearray(gzip.decompress(path.read_bytes()))
    change(raw)
    path.write_bytes(gzip.compress(bytes(raw)))


def long_quaternion(raw):
    """A qform alone, whose quaternion is long by rounding."""
    struct.pack_into("<2h", raw, 252, 1, 0)
    scale = (1 + 1e-5) ** 0.5
    struct.pack_into("<6f", raw, 256, 0.6 * scale, 0.8 * scale, 0.0, 0, 0, 0)


@pytest.mark.parametrize("kind", ["quaternion", "plain", "bytes behind", "checksum cut off", "two members"])
def test_what_the_reader_takes_is_taken(tmp_path, kind):
    write_nifti(tmp_path)
    for path in tmp_path.glob("*/*.nii.gz"):
        content = path.read_bytes()
        plain = gzip.decompress(content)
        if kind == "quaternion":
            rewrite(path, long_quaternion)
        elif kind == "plain":
            path.write_bytes(plain)
        elif kind == "bytes behind":
            path.write_bytes(content + b"behind" * 30)
        elif kind == "checksum cut off":
            path.write_bytes(content[:-8])
        else:
            path.write_bytes(gzip.compress(plain[:400]) + gzip.compress(plain[400:]))
    assert score(tmp_path) == ((1.0, 1.5), "mm", [])


@pytest.mark.parametrize("header", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "plain.nii.gz"])
def test_a_file_that_lacks_one_voxel_is_refused(tmp_path, header, name):
    path = tmp_path / name
    raw = header(MASKS["A"].T, np.eye(4)).to_bytes()
    wrap = gzip.compress if name == "a.nii.gz" else bytes
    path.write_bytes(wrap(raw))
    check_whole(path)
    path.write_bytes(wrap(raw[:-1]))
    with pytest.raises(UserError, match=rf"{name}: holds {len(raw) - 1} bytes, its header claims {len(raw)}"):
        check_whole(path)


def test_a_sheared_image_says_how_to_mend_it_and_that_mends_it(tmp_path):
    affine = np.diag([1.0, 1.5, 3.0, 1.0])
    write_nifti(tmp_path, "a")
    write_nifti(tmp_path, "b", affine=affine + np.eye(4, k=1) * [0, 0.02, 0, 0])
    with pytest.raises(UserError, match=r"b.nii.gz: SimpleITKIO cannot read it .* not at right angles") as error:
        score(tmp_path)
    recipe = re.search(r"Python: (.*)\); if", str(error.value)).group(1)
    for path in tmp_path.glob("*/b.nii.gz"):
        exec(recipe, {"nibabel": nibabel, "FILE": path, "NEW_FILE": path})
    assert np.allclose(score(tmp_path)[0], (1.0, 1.5), atol=1e-3)


def test_names_that_begin_with_a_dot_are_no_cases(tmp_path, monkeypatch):
    write_nifti(tmp_path)
    for side in ("ref", "A"):
        (tmp_path / side / "._a.nii.gz").write_bytes(b"\0\5\26\7" + bytes(100))
    assert list(segmentations(tmp_path / "ref", ".nii.gz")) == ["c"]
    assert score(tmp_path)[0] == (1.0, 1.5)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compare(tmp_path, tmp_path / "out", home="~") == 0


def test_headers_that_differ_are_scored_voxel_by_voxel_under_one_warning(tmp_path):
    turned = np.diag([1.0, 1.5, 3.0, 1.0])
    turned[:2, :2] = [[np.cos(2e-3), -1.5 * np.sin(2e-3)], [np.sin(2e-3), 1.5 * np.cos(2e-3)]]
    turned[:3, 3] = 4, 5, 6
    for case in ("c", "d"):
        write_nifti(tmp_path, case)
        write_nifti(tmp_path, case, affine=turned, sides=["ref"])
    values, unit, (warning,) = score(tmp_path)
    assert np.allclose(values, (1.0, 1.5), atol=1e-5) and unit == "mm"
    assert "HEADERS DIFFER in 4 of 4 pairs" in warning and "CopyInformation" in warning
    assert f"{tmp_path}/ref/c.nii.gz has origin (-4, -5, 6)" in warning
    assert f"{tmp_path}/A/c.nii.gz has origin (0, 0, 0)" in warning


@pytest.mark.parametrize("odd", ["ref", "A", "B"])
@pytest.mark.parametrize("change", ["spacing", "shape"])
def test_the_file_on_another_grid_is_named(tmp_path, monkeypatch, odd, change):
    write_nifti(tmp_path)
    if change == "shape":
        monkeypatch.setitem(MASKS, odd, MASKS[odd][:4])
    write_nifti(tmp_path, affine=np.diag([1.0, 1.5, 3.0 if change == "shape" else 4.0, 1.0]), sides=[odd])
    with pytest.raises(UserError, match=rf"^{tmp_path}/{odd}/c.nii.gz \(.*: the other 2 files"):
        score(tmp_path)


def test_a_dataset_json_of_version_1_is_called_old(tmp_path):
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "box"}, "numTraining": 2}))
    with pytest.raises(UserError, match=r"of nnU-Net version 1 .* nnUNetv2_convert_old_nnUNet_dataset"):
        read_labels(path)


def test_perturbed_tiffs_keep_their_spacing(tmp_path):
    from nnunet_l2g.compare.predicting import write_images
    from nnunet_l2g.evaluation.shifts import perturb_file

    image = tmp_path / "c_0000.tif"
    tifffile.imwrite(image, np.arange(60, dtype=np.uint16).reshape(3, 4, 5))
    (tmp_path / "c.json").write_text(json.dumps({"spacing": SPACING}))
    (tmp_path / "out").mkdir()
    variant = functools.partial(perturb_file, kind="noise", strength=0.1)
    write_images({"c": [image]}, ".tif", {"__noise0.1": variant}, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["c__noise0.1.json", "c__noise0.1_0000.tif"]
    assert json.loads((tmp_path / "out" / "c__noise0.1.json").read_text())["spacing"] == [*SPACING]


def test_a_file_that_no_reader_opens_is_blamed_and_not_its_format(tmp_path):
    write_nifti(tmp_path)
    (tmp_path / "ref" / "c.nii.gz").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=rf"^{tmp_path}/ref/c.nii.gz: none of nnU-Net's readers can open it; replace"):
        score(tmp_path)
