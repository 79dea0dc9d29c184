"""How much of the gap between two domains does GLUA close? Beside it: source only, controls, ablations, the supervised ceiling.

python benchmarks/adaptation.py --pair phantom --folder WORK --epochs 20 --repeats 2 -o OUT.json
python benchmarks/adaptation.py --pair hippocampus --data nnUNet_raw --folder WORK --epochs 20 --repeats 2 -o OUT.json
python benchmarks/adaptation.py --pair nuclei --data nnUNet_raw --folder WORK --epochs 20 --repeats 2 -o OUT.json

Everything through the command lines of nnU-Net and of nnunet_l2g, in nnU-Net folders of its own below WORK: writes the pair,
plans the source, adapts it to the target, trains each method on fold 0 with the same plans and epochs, predicts the target's
test images and scores them. What is there already is kept: the same command goes on where it stopped. Twins that translate
take over GLUA's finished first stage. Logs are in WORK/logs. "source inverted" only inverts channels of the source, as
GLUA measures it; "GLUA x100" aligns with a hundred times the weight, and so on.

Scores: Dice and 95 % Hausdorff distance per case, mean over its structures. Share of the gap closed: (method - source only) /
(supervised - source only) of mean Dice, with a bootstrap interval over test cases. Target labels are read by the ceiling and
by the scores of test images alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from adaptation_pairs import PAIRS, Pair, write_pair
from timing import conditions

from nnunet_l2g.autoload import VARIABLE, with_trainers
from nnunet_l2g.nnunet import nnunet_command, shown_command

SOURCE_ONLY, SUPERVISED = "source only", "supervised"
METHODS = {  # GLUA before those that take its translation over
    SOURCE_ONLY: "nnUNetTrainer",
    SUPERVISED: "nnUNetTrainer",
    "source inverted": "nnUNetTrainerGLUAInversionOnly",
    "random intensity": "nnUNetTrainerRandomIntensity",
    "GLUA": "nnUNetTrainerGLUA",
    "no mask": "nnUNetTrainerGLUANoMask",
    "translation only": "nnUNetTrainerGLUATranslationOnly",
    "no translation": "nnUNetTrainerGLUANoTranslation",
    "self-training": "nnUNetTrainerGLUASelfTraining",
}
STRENGTHS = {f"{method} x{factor}": factor for factor in (10, 100, 1000) for method in ("GLUA", "no mask")}
METHODS |= {strong: METHODS[strong.rsplit(" ", 1)[0]] for strong in STRENGTHS}
TAKES_OVER = ("no mask", "translation only", "self-training", *STRENGTHS)
STAGE = "stage_translation.pth"
RESAMPLES = 10_000
KEPT = ("pair", "epochs", "iterations", "batch_size", "patch_size", "translator_width", "slices", "translation_share")
TRANSLATES = """import nnunet_l2g.trainers
from nnunet_l2g.trainers import {} as Base


class {}(Base):
    translation_settings = {{"width": {}}}
    stage_settings = {{"slices": {}}}
    translation_share = {}
    alignment_weights = tuple({} * weight for weight in nnunet_l2g.trainers.nnUNetTrainerGLUA.alignment_weights)
"""


def main() -> None:
    args = parse_arguments()
    pair = write_pair(args.pair, make(args.folder / "raw"), args.data)
    work = Work(args, replace(pair, configuration=args.configuration or pair.configuration))
    work.prepare()
    result = {"conditions": conditions(torch.device(args.device)), "repeats": []}
    for repeat in range(args.repeats):
        rows = {}
        result["repeats"].append(rows)
        for name in args.methods:
            rows[name] = work.measure(name, repeat)
            add_shares(rows)
            if args.output:
                args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"\nrepeat {repeat}\n{table(rows)}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, required=True)
    parser.add_argument("--folder", type=Path, required=True, help="for nnU-Net's folders, logs and predictions")
    parser.add_argument("--data", type=Path, help="nnUNet_raw with the real data that the pair is made of")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--iterations", type=int, help="of an epoch; default: nnU-Net's 250")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[m for m in METHODS if m not in STRENGTHS])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--configuration", choices=("2d", "3d_fullres"), help="default: the pair's")
    parser.add_argument("--batch-size", type=int, help="of the plans; default: as planned")
    parser.add_argument("--patch-size", type=int, help="longest side of the plans' patch, in voxels; default: as planned")
    parser.add_argument("--translator-width", type=int, default=32, help="smaller for a CPU; default: %(default)s")
    parser.add_argument("--translation-share", type=float, default=0.5, help="epochs of it for each of the segmenter's")
    parser.add_argument("--slices", type=int, default=16, help="of a translation step; smaller for a CPU; default: %(default)s")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    if PAIRS[args.pair].supervised is None:
        args.methods = [name for name in args.methods if name != SUPERVISED]
    args.methods = [name for name in METHODS if name in args.methods]
    if set(args.methods) & set(TAKES_OVER) and "GLUA" not in args.methods:
        parser.error(f"{', '.join(TAKES_OVER)} take over the translation of GLUA; name it too")
    return args


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Work:
    """A pair in a folder: prepared once, each method trained, predicted and scored once for each repeat."""

    def __init__(self, args: argparse.Namespace, pair: Pair):
        self.args, self.pair, self.folder = args, pair, args.folder
        self.source, self.target = number(pair.source), number(pair.target)
        self.adapted = f"nnUNetPlans_to{self.target}"
        self.environment = os.environ | {
            "nnUNet_raw": str(self.folder / "raw"),
            "nnUNet_preprocessed": str(make(self.folder / "preprocessed")),
            "nnUNet_results": str(make(self.folder / "results_0")),
            VARIABLE: with_trainers(str(make(self.folder / "trainers"))),
            "PYTHONUNBUFFERED": "1",
        }

    def prepare(self) -> None:
        """Plans, adapts, and preprocesses the ceiling's data with the source's plans."""
        configuration = self.pair.configuration
        self.refuse_other_settings()
        self.once("plan", "nnUNetv2_plan_and_preprocess", "-d", self.source, "-c", configuration, "--no_pp")
        self.make_small(self.folder / "preprocessed" / self.pair.source / "nnUNetPlans.json")
        self.once("preprocess", "nnUNetv2_preprocess", "-d", self.source, "-c", configuration)
        self.once("adapt", "nnunet_l2g", "adapt", "-s", self.source, "-t", self.target, "-c", configuration)
        if self.pair.supervised and SUPERVISED in self.args.methods:
            supervised, plans = number(self.pair.supervised), f"nnUNetPlans_from{self.source}"
            names = ("-s", self.source, "-t", supervised, "-sp", "nnUNetPlans", "-tp", plans)
            self.once("plan_supervised", "nnUNetv2_plan_and_preprocess", "-d", supervised, "-c", configuration, "--no_pp")
            self.once("plans_supervised", "nnUNetv2_move_plans_between_datasets", *names)
            named = ("-c", configuration, "-plans_name", plans)
            self.once("preprocess_supervised", "nnUNetv2_preprocess", "-d", supervised, *named)

    def refuse_other_settings(self) -> None:
        """SystemExit if WORK was made with other lengths or plans: what is there would be taken for what was asked for."""
        ours = {key: getattr(self.args, key) for key in KEPT} | {"configuration": self.pair.configuration}
        file = self.folder / "settings.json"
        theirs = json.loads(file.read_text()) if file.exists() else ours
        other = [f"{key}: there {theirs.get(key)}, here {value}" for key, value in ours.items() if theirs.get(key) != value]
        if other:
            raise SystemExit(f"{file} is of other settings ({'; '.join(other)}); name another --folder")
        file.write_text(json.dumps(ours, indent=1) + "\n")

    def make_small(self, plans: Path) -> None:
        """Writes --batch-size and --patch-size into the plans; a smaller patch has the stages that leave it 4 voxels a side."""
        size, side = self.args.batch_size, self.args.patch_size
        content = json.loads(plans.read_text())
        configuration = content["configurations"][self.pair.configuration]
        configuration["batch_size"] = size or configuration["batch_size"]
        if side is not None:
            patch = np.minimum(configuration["patch_size"], side)
            architecture = configuration["architecture"]["arch_kwargs"]
            left = patch / np.cumprod(architecture["strides"], axis=0)  # (stages, dims)
            stages = int((left >= 4).all(axis=1).sum())
            for key in ("features_per_stage", "kernel_sizes", "strides", "n_conv_per_stage"):
                architecture[key] = architecture[key][:stages]
            architecture["n_conv_per_stage_decoder"] = architecture["n_conv_per_stage_decoder"][: stages - 1]
            configuration["patch_size"], architecture["n_stages"] = patch.tolist(), stages
        plans.write_text(json.dumps(content, indent=4))

    def measure(self, method: str, repeat: int) -> dict:
        """Scores of one method, trained and predicted if that has not been done yet."""
        results = make(self.folder / f"results_{repeat}")
        dataset, plans = self.pair.source, self.adapted
        if method == SUPERVISED:
            dataset, plans = self.pair.supervised, f"nnUNetPlans_from{self.source}"
        configuration, trainer = self.pair.configuration, self.trainer(method)
        common = {"nnUNet_results": str(results)}
        fold = results / dataset / f"{trainer}__{plans}__{configuration}" / "fold_0"
        label = f"{method.replace(' ', '_')}_{repeat}"
        if method in TAKES_OVER and not (fold / STAGE).exists():
            first = results / dataset / f"{self.trainer('GLUA')}__{plans}__{configuration}" / "fold_0" / STAGE
            shutil.copy(first, make(fold) / STAGE)
        resume = ["--c"] if fold.exists() else []
        begin = time.perf_counter()
        train = ["-tr", trainer, "-p", plans, "-device", self.args.device, *resume]
        self.once(f"train_{label}", "nnUNetv2_train", number(dataset), configuration, "0", *train, **common)
        output = self.folder / "predictions" / label
        files = ["-i", self.folder / "raw" / self.pair.target / "imagesTs", "-o", output]
        model = ["-d", number(dataset), "-c", configuration, "-f", "0", "-tr", trainer, "-p", plans]
        self.once(f"predict_{label}", "nnUNetv2_predict", *model, *files, "-device", self.args.device, **common)
        dice, hd95 = self.score(output)
        log = (self.folder / "logs" / f"train_{label}.log").read_text()
        return {
            "dice": dice,
            "hd95": hd95,
            "mean_dice": float(np.mean(list(dice.values()))),
            "mean_hd95": float(np.nanmean(list(hd95.values()))),
            "hd95_undefined": int(np.isnan(list(hd95.values())).sum()),
            "last_epoch": last_diagnostics(log),
            "train_seconds": round(time.perf_counter() - begin, 1),
        }

    def trainer(self, method: str) -> str:
        """Its name; with a translation that no trainer has, that of one written for it in WORK/trainers."""
        args, name = self.args, METHODS[method]
        lengths = f"{args.epochs}epochs" + (f"_{args.iterations}iterations" if args.iterations else "")
        translation = (args.translator_width, args.slices, args.translation_share)
        if "GLUA" in name and (translation != (32, 16, 0.5) or method in STRENGTHS):
            factor = STRENGTHS.get(method, 1)
            stronger = f"x{factor}" if factor > 1 else ""
            written = f"{name}{stronger}_w{args.translator_width}s{args.slices}"
            code = TRANSLATES.format(name, written, *translation, factor)
            (self.folder / "trainers" / f"{written}.py").write_text(code)
            return f"{written}_{lengths}"
        return f"{name}_{lengths}"

    def score(self, predictions: Path) -> tuple[dict[str, float], dict[str, float]]:
        """Dice and HD95 by case, each the mean over structures."""
        from nnunet_l2g.evaluation.cases import Options, Pair, references_for, score_pairs, segmentations
        from nnunet_l2g.evaluation.labels import read_labels

        files = self.folder / "raw" / self.pair.target
        reference_folder = files / "labelsTs"
        description = predictions / "dataset.json"  # nnU-Net's copy of the source's: the target's need name no labels
        ending = json.loads(description.read_text())["file_ending"]
        labels = read_labels(description, next(iter(segmentations(reference_folder, ending).values())))
        predicted = segmentations(predictions, ending)
        references = references_for(list(predicted), reference_folder, ending)
        pairs = [Pair("", case, references[case], predicted[case]) for case in predicted]
        scores, _ = score_pairs(pairs, labels, Options())
        rows = {case: list(structures.values()) for (_, _, case), structures in scores.items()}
        mean = {key: {case: nan_mean([s[key] for s in row]) for case, row in rows.items()} for key in ("dice", "hd95")}
        return mean["dice"], mean["hd95"]

    def once(self, label: str, script: str, *arguments: object, **variables: str) -> None:
        """Runs a command unless it ended well before; its output is in WORK/logs."""
        done, log = make(self.folder / "done") / label, make(self.folder / "logs") / f"{label}.log"
        if done.exists():
            return
        arguments = [str(argument) for argument in arguments]
        print(f"{time.strftime('%H:%M:%S')} {shown_command(script, arguments)}", flush=True)
        with log.open("a") as file:
            child = subprocess.run(
                nnunet_command(script, arguments), env=self.environment | variables, stdout=file, stderr=subprocess.STDOUT
            )
        if child.returncode:
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise SystemExit(f"{tail}\n{script} ended with exit status {child.returncode}; {log} has all it said")
        done.touch()


def number(dataset: str) -> str:
    return str(int(dataset[7:10]))


def nan_mean(values: list[float]) -> float:
    values = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def last_diagnostics(log: str) -> dict[str, float]:
    """What GLUA logged of the last epoch."""
    found = re.findall(r"((?:(?:gap|mask|domain|alignment|confident)_\w+ [\d.e-]+ ?)+)$", log, re.M)
    return {key: float(value) for key, value in re.findall(r"(\w+) ([\d.e-]+)", found[-1])} if found else {}


def add_shares(rows: dict[str, dict]) -> None:
    """To each row the share of the gap closed, and its 95 % bootstrap interval over test cases."""
    if not {SOURCE_ONLY, SUPERVISED} <= set(rows):
        return
    cases = sorted(rows[SOURCE_ONLY]["dice"])
    values = {name: np.array([row["dice"][case] for case in cases]) for name, row in rows.items()}
    draws = np.random.default_rng(0).integers(len(cases), size=(RESAMPLES, len(cases)))
    for name, row in rows.items():
        part, whole = values[name] - values[SOURCE_ONLY], values[SUPERVISED] - values[SOURCE_ONLY]
        row["share"] = float(part.mean() / whole.mean())
        shares = part[draws].mean(1) / whole[draws].mean(1)
        row["share_interval"] = [float(q) for q in np.percentile(shares, (2.5, 97.5))]


def table(rows: dict[str, dict]) -> str:
    """Markdown."""
    lines = ["| method | Dice | HD95 | share of the gap closed (95 %) | last epoch |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        share = "{:.2f} ({:.2f} to {:.2f})".format(row["share"], *row["share_interval"]) if "share" in row else ""
        undefined = f" ({row['hd95_undefined']} cases undefined)" if row["hd95_undefined"] else ""
        last = ", ".join(f"{key} {value:.3g}" for key, value in row["last_epoch"].items())
        lines.append(f"| {name} | {row['mean_dice']:.3f} | {row['mean_hd95']:.1f}{undefined} | {share} | {last} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
