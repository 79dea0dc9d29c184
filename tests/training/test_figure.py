"""The figure of diagnostics over epochs."""

import pytest
from matplotlib.axes import Axes
from PIL import Image

from nnunet_l2g.training.figure import HEIGHT, WIDTH, draw_diagnostics


@pytest.fixture
def drawn(monkeypatch):
    """Titles of the panels, and (label, values) of each panel's curves."""
    titles, curves = [], []
    set_title, plot = Axes.set_title, Axes.plot

    def titled(axes, text, **keywords):
        titles.append(text)
        return set_title(axes, text, **keywords)

    def plotted(axes, x, y, **keywords):
        curves.append((keywords["label"], list(y)))
        return plot(axes, x, y, **keywords)

    monkeypatch.setattr(Axes, "set_title", titled)
    monkeypatch.setattr(Axes, "plot", plotted)
    return titles, curves


def test_training_and_validation_share_a_panel_and_the_page_has_room_for_all(tmp_path, drawn):
    titles, curves = drawn
    log = {f"{part}_{key}": [index + 1.0, 2.0] for index, key in enumerate("abcd") for part in ("train", "validation")}
    log |= {"references_used": [0.0, 1e-3], "empty": []}
    file = tmp_path / "progress.png"
    file.write_bytes(b"the last one")
    draw_diagnostics(log, list(log), str(file))
    assert titles == ["a", "b", "c", "d", "references in use", "empty"]
    assert curves[:2] == [("train", [1.0, 2.0]), ("validation", [1.0, 2.0])] and len(curves) == 4 * 2 + 2
    with Image.open(file) as image:
        assert image.size == (round(3 * WIDTH * 110), round(2 * HEIGHT * 110))
    assert list(tmp_path.iterdir()) == [file]


def test_one_panel_of_one_epoch(tmp_path, drawn):
    draw_diagnostics({"perplexity": [3.0]}, ["perplexity"], str(tmp_path / "progress.png"))
    with Image.open(tmp_path / "progress.png") as image:
        assert image.size == (round(WIDTH * 110), round(HEIGHT * 110))
    assert drawn[0] == ["codes: perplexity"] and drawn[1][0][1] == [3.0]
