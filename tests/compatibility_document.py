"""docs/compatibility.md, written from the results of a test run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from compatibility_cell import AUTOENCODER, STAGES, TRANSLATION
from compatibility_settings import FEATURES, PLANNED_PATCH, SETTINGS, configuration_of

from nnunet_l2g.compatibility import NNUNET_RANGE

DOCUMENT = Path(__file__).parents[1] / "docs" / "compatibility.md"
WRITE = "NNUNET_L2G_WRITE_COMPATIBILITY"
VERSIONS = "## Versions"
FAMILIES = {
    "L2GNet": [name for name in STAGES if "L2GNet" in name],
    "GRCSF": [name for name in STAGES if "GRCSF" in name or "DiceFocal" in name],
    "GLUA": [name for name in STAGES if "GLUA" in name or "RandomIntensity" in name],
}

HEADER = """# Compatibility

Every trainer on the plans that nnU-Net makes for a setting. Written by its own test:
`pytest -m long tests/project/test_compatibility.py` runs all
combinations and fails if this page says anything else. To write it anew:

```
{write}=1 pytest -n 0 -m long tests/project/test_compatibility.py
```

{families}

The settings have 1 channel and 3 classes, the background among them, where the name says nothing else; a batch is 2, with
ResEnc plans 1. Plain nnU-Net, too, trains no network of fewer than 3 stages (the test shows it).

{table}
**passes** means that all of this was done, in one process on the CPU:

1. nnU-Net's planner plans the dataset; the trainer is made as `nnUNetv2_train` makes it, and `on_train_start` runs.
2. What comes before the segmenter is trained, one training and one validation step, and writes its checkpoint:
   - the masked autoencoder of {autoencoder};
   - the translation of {translation}.
3. Two epochs of one training and one validation step each: losses, weights and logged diagnostics are finite. In the second,
   GLUA's alignment and self-training have their full weight.
4. `save_checkpoint`; nnU-Net's `nnUNetPredictor` predicts an image of two windows from the model folder.
5. nnU-Net's `export_pretrained_model` and `install_model_from_zip_file`, into another results folder; labels and
   probabilities predicted from there are the same to the last bit.

**refuses** means one sentence before anything is trained:

{refusals}

What a pass does not show: images and labels are random, and preprocessing, augmentation and worker processes are left out
(other tests and the demo run them), as are GPUs, `torch.compile` and DDP. Networks are small: {least} to {most} features for
each stage, an autoencoder {width} wide with {depth} block, a translation {translator} wide. Their topology (stages, strides,
kernels, blocks) is that of nnU-Net's planner. The ResEnc plans are for images of 96 x 512 x 512 voxels of 3 x 0.8 x 0.8 mm;
their networks are built for the planned patch and run on one with two voxels at the bottleneck, predicting without
mirroring. `progress.png` and `summary.json`, which the export demands, are stand-ins, and GLUA's target is a batch of other
random images.

"""


def document(results: Mapping[tuple[str, str], str], plans: Mapping[str, dict], versions: str) -> str:
    """The page.

    Parameters
    ----------
    results : (trainer, setting) -> "" for a pass, or the refusal
    plans : setting -> plans
    versions : the section on versions, which no test here writes
    """
    refusals = [text for text in dict.fromkeys(results[t, s] for s in SETTINGS for t in STAGES) if text]
    rows = []
    for name, setting in SETTINGS.items():
        configuration = configuration_of(plans[name], setting)
        patch = _times(configuration[PLANNED_PATCH])
        if setting.shrink:
            patch += f", run on {_times(configuration['patch_size'])}"
        stages = configuration["architecture"]["arch_kwargs"]["n_stages"]
        words = [_word({t: results[t, name] for t in trainers}, refusals) for trainers in FAMILIES.values()]
        rows.append([name, f"`{setting.configuration}`", patch, stages, *words])
    text = HEADER.format(
        write=WRITE,
        families="\n".join(f"- **{family}**: {_list(trainers)}" for family, trainers in FAMILIES.items()),
        table=_table(["setting", "configuration", "planned patch", "stages", *FAMILIES], rows),
        autoencoder=_list(t for t in STAGES if STAGES[t] == "autoencoder"),
        translation=_list(t for t in STAGES if STAGES[t] == "translation"),
        refusals="\n".join(f"{number}. {refusal}" for number, refusal in enumerate(refusals, 1)),
        least=FEATURES[0], most=FEATURES[1], width=AUTOENCODER["width"], depth=AUTOENCODER["depth"],
        translator=TRANSLATION["translation_settings"]["width"],
    )  # fmt: skip
    return text + versions


def versions_section() -> str:
    """That of the page as it is, or a first one."""
    text = DOCUMENT.read_text() if DOCUMENT.exists() else ""
    if VERSIONS in text:
        return text[text.index(VERSIONS) :]
    return f"{VERSIONS}\n\n`setup.cfg` allows nnU-Net {NNUNET_RANGE}, Python from 3.10 on, and any torch.\n"


def _word(outcomes: Mapping[str, str], refusals: list[str]) -> str:
    """One word for a family, or one for each of its trainers if they differ."""
    words = {name: f"refuses ({refusals.index(text) + 1})" if text else "passes" for name, text in outcomes.items()}
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return ", ".join(f"{_short(name)} {word}" for name, word in words.items())


def _short(trainer: str) -> str:
    return trainer.removeprefix("nnUNetTrainer")


def _list(trainers) -> str:
    return ", ".join(map(_short, trainers))


def _times(sizes) -> str:
    return " x ".join(map(str, sizes))


def _table(header: list, rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
