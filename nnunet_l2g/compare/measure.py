"""A short measured run of each model: arithmetic, memory, inference time. Needs no weights, so none are loaded."""

from __future__ import annotations

import time
from pathlib import Path

from nnunet_l2g.compare.models import Model, nnunet_folder
from nnunet_l2g.compare.results import Run, read_plans
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.labels import read_dataset_json
from nnunet_l2g.files import check_plain_name
from nnunet_l2g.lookup import find_trainer, quiet
from nnunet_l2g.nnunet_files import check_network_classes, read_voxels


def measure(models: list[Model], runs: list[Run], dataset: str, device: str) -> list[dict[str, float]]:
    """For each model, with its run: gflops, seconds_per_case and, on a GPU, memory_gib.

    gflops : of one forward of one patch, a multiply-add counting two, as torch's counter knows the operations
    seconds_per_case : sliding window over the first validation case as preprocessed, with the checkpoint's mirroring; reading,
        resampling and writing not included
    memory_gib : the allocator's peak in one training step (batch of the plan, mixed precision, deep supervision, gradients;
        neither compiled nor with the trainer's auxiliary losses)

    Raises
    ------
    UserError : a model cannot be built or run here; names it
    """
    results = []
    for model, run in zip(models, runs, strict=True):
        print(f"measuring {model.name} on {device} ...", flush=True)
        try:
            results.append(_measure_one(model, run, dataset, device))
        except UserError:
            raise
        except Exception as error:  # a foreign network, a full GPU: anything can happen here
            cause = f"{type(error).__name__}: {error}"
            raise UserError(f"--measure: {model.name} cannot be measured on {device} ({cause}); leave --measure out") from error
    return results


def _measure_one(model: Model, run: Run, dataset: str, device: str) -> dict[str, float]:
    import torch
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    trainer = find_trainer(model.trainer)
    if trainer is None:
        raise UserError(f"--measure: nnU-Net finds no trainer {model.trainer}; run `nnunet_l2g doctor`")
    plans, labels = PlansManager(read_plans(model)), read_dataset_json(model.folder / "dataset.json")
    configuration = plans.get_configuration(model.configuration)
    check_network_classes(configuration, model.folder / "plans.json")
    channels = determine_num_input_channels(plans, configuration, labels)
    heads = plans.get_label_manager(labels).num_segmentation_heads

    def build(deep_supervision: bool) -> torch.nn.Module:
        return trainer.build_network_architecture(plans, configuration, channels, heads, deep_supervision).to(device)

    patch = torch.zeros(1, channels, *configuration.patch_size, device=device)  # (1, C, *spatial)
    network = build(deep_supervision=False).eval()
    results = {"gflops": count_flops(network, patch) / 1e9}
    image = _first_case(run, configuration.data_identifier, dataset)
    if image.shape[0] != channels:  # a cascade's second stage takes the first's segmentation too
        image = torch.cat([image, torch.zeros(channels - image.shape[0], *image.shape[1:])])
    results["seconds_per_case"] = _time_inference(network, image, plans, configuration, labels, model, run, device)
    if device == "cuda":
        del network
        results["memory_gib"] = _training_memory(build(deep_supervision=True), patch, configuration.batch_size)
    return results


def count_flops(network, patch) -> int:
    """Floating-point operations of one forward without gradients."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(patch)
    return counter.get_total_flops()


def _first_case(run: Run, identifier: str, dataset: str):
    """The first validation case as nnU-Net preprocessed it, (C, z, y, x)."""
    import torch

    check_plain_name(identifier, "--measure: data_identifier in the plans")
    folder: Path = nnunet_folder("preprocessed") / dataset / identifier
    case = min(run.predictions)
    if not folder.is_dir():
        raise UserError(f"--measure: {folder} is missing; run nnUNetv2_preprocess, or compare without --measure")
    return torch.from_numpy(read_voxels(folder, case)).float()


def _time_inference(network, image, plans, configuration, labels, model, run, device) -> float:
    import torch

    with quiet():
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

        predictor = nnUNetPredictor(
            perform_everything_on_device=device == "cuda", device=torch.device(device), verbose=False, allow_tqdm=False
        )
    predictor.manual_initialization(network, plans, configuration, None, labels, model.trainer, run.mirroring)
    if device == "cuda":
        predictor.predict_sliding_window_return_logits(image)  # cuDNN chooses its kernels
        torch.cuda.synchronize()
    begin = time.perf_counter()
    predictor.predict_sliding_window_return_logits(image)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _training_memory(network, patch, batch_size: int) -> float:
    import torch

    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.99, nesterov=True)
    batch = patch.expand(batch_size, *patch.shape[1:]).contiguous()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the optimiser's state is there from the second step on
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda"):
            outputs = network.train()(batch)
            loss = sum(output.float().mean() for output in (outputs if isinstance(outputs, (list, tuple)) else [outputs]))
        loss.backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated() / 1024**3
