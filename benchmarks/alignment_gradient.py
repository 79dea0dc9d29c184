"""What can GLUA's alignment and its mask do to the encoder? Gradients of a trained model's terms, beside the segmentation's.

python benchmarks/alignment_gradient.py -d 901 -c 2d -p nnUNetPlans_to902 -tr nnUNetTrainerGLUA_20epochs [-f 0] [-o OUT.json]

Reads checkpoint_final.pth of a finished training and leaves no more there than a log of nnU-Net's. For each batch of the
fold's training data, with the checkpoint's translator and discriminator, the gradient with respect to the encoder of three
terms: the segmentation loss, mean (D(f_t) - 1)^2, and the same with the local feature mask. Their norms (of weight 1), the
cosine between the alignment with and without the mask (1: the mask changes the size of the step and not where it goes), the
cosine of the alignment and the segmentation, and the ratio of the alignment's norm to the segmentation's at the trainer's
last weight. Means over batches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from nnunetv2.run.run_training import get_trainer_from_args
from timing import choose_device, conditions, write_json

from nnunet_l2g.architectures.glua.local_feature_mask import local_feature_mask


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", required=True)
    parser.add_argument("-c", dest="configuration", required=True)
    parser.add_argument("-p", dest="plans", required=True)
    parser.add_argument("-tr", dest="trainer", required=True, help="nnUNetTrainerGLUA of any length, or its NoMask")
    parser.add_argument("-f", dest="fold", type=int, default=0)
    parser.add_argument("--batches", type=int, default=20, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: %(default)s")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE", help="write the result as JSON")
    args = parser.parse_args()
    device = choose_device(args.device)
    trainer = get_trainer_from_args(args.dataset, args.configuration, args.fold, args.trainer, args.plans, device=device)
    trainer.initialize()
    trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    training, _ = trainer.dataloader_train, trainer.dataloader_val = trainer.get_dataloaders()
    try:
        rows = [measure(trainer, next(training)) for _ in range(args.batches)]
    finally:
        trainer._finish_loaders()
    mean = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
    weight = trainer.alignment_weights[1]
    mean["alignment over segmentation at the last weight"] = weight * mean["alignment"] / mean["segmentation"]
    for key, value in mean.items():
        print(f"{key:48}{value:10.4g}")
    write_json(conditions(device) | {"weight": weight, "batches": args.batches, "mean": mean, "rows": rows}, args.output)
    return 0


def measure(trainer, batch: dict) -> dict[str, float]:
    """Norms and cosines of one batch, see the top of this file."""
    network, discriminator = trainer.raw_network.train(), trainer.alignment_of_features.discriminator
    images = trainer._translate_some(batch["data"].to(trainer.device))  # (B, C, *patch)
    network.unlabelled, network.align = batch["unlabelled"].to(trainer.device), True
    logits = network(images)
    targets = batch["target"]
    targets = [t.to(trainer.device) for t in targets] if isinstance(targets, list) else targets.to(trainer.device)
    score = discriminator(network._seen.target)  # (B, 1, *spatial)
    error, mask = (score - 1).square(), local_feature_mask(score)
    terms = {
        "segmentation": trainer.loss.loss(logits, targets),
        "alignment": error.mean(),
        "masked alignment": (mask * error).mean(),
    }
    network.forget()
    parameters = list(network.encoder.parameters())
    gradients = {
        name: torch.cat([g.flatten() for g in torch.autograd.grad(term, parameters, retain_graph=True)]).double()
        for name, term in terms.items()
    }
    right = (score < 0.5).double().mean()
    return {name: float(gradient.norm()) for name, gradient in gradients.items()} | {
        "cosine of alignment with and without mask": cosine(gradients["alignment"], gradients["masked alignment"]),
        "cosine of alignment and segmentation": cosine(gradients["alignment"], gradients["segmentation"]),
        "mean of the mask": float(mask.mean()),
        "coefficient of variation of the mask": float(mask.std() / mask.mean()),
        "target positions D is right about": float(right),
    }


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()).clamp_min(1e-30))


if __name__ == "__main__":
    sys.exit(main())
