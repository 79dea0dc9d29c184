"""--measure: arithmetic, inference time and memory of each model's network. They need no weights, so none are loaded."""

from __future__ import annotations

import time

from nnunet_l2g.compare.models import Model, nnunet_folder
from nnunet_l2g.compare.results import Run, read_plans
from nnunet_l2g.compare.training import check_trainer
from nnunet_l2g.errors import UserError
from nnunet_l2g.evaluation.labels import read_dataset_json
from nnunet_l2g.files import check_plain_name
from nnunet_l2g.lookup import quiet
from nnunet_l2g.nnunet_files import check_network_classes, read_voxels


def measure(models: list[Model], runs: list[Run], dataset: str, device: str) -> list[dict[str, float]]:
    """For each model, with its run: gflops, seconds_per_case and, on a GPU, memory_gib.

    gflops : of one forward of one patch, a multiply-add counting two, as torch's counter knows the operations
    seconds_per_case : sliding window over the first validation case as preprocessed, with the checkpoint's mirroring; reading,
        resampling and writing not included
    memory_gib : the allocator's peak in one training step (batch of the plan, mixed precision, deep supervision, gradients;
        neither compiled nor with the trainer's auxiliary losses)

    UserError if a model cannot be built or run here; names it.
    """
    results = []
    for model, run in zip(models, runs, strict=True):
        print(f"measuring {model.name} on {device} ...", flush=True)
        try:
            results.append(_measure_one(model, run, dataset, device))
        except UserError:
            raise
        except Exception as error:  # somebody else's network, or a full GPU: each raises its own
            cause = f"{type(error).__name__}: {error}"
            raise UserError(f"--measure: {model.name} cannot be measured on {device} ({cause}); leave --measure out") from error
    return results


def _measure_one(model: Model, run: Run, dataset: str, device: str) -> dict[str, float]:
    import torch

    with quiet():
        from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
        from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    trainer = check_trainer(model.trainer)
    plans, labels = PlansManager(read_plans(model)), read_dataset_json(model.folder / "dataset.json")
    configuration = plans.get_configuration(model.configuration)
    check_network_classes(configuration, model.folder / "plans.json")
    channels = determine_num_input_channels(plans, configuration, labels)
    heads = plans.get_label_manager(labels).num_segmentation_heads
    patch = torch.zeros(1, channels, *configuration.patch_size, device=device)  # (1, C, *spatial)

    network = trainer.build_network_architecture(plans, configuration, channels, heads, False).to(device).eval()
    results = {"gflops": count_flops(network, patch) / 1e9}
    gpu = device == "cuda"
    predictor = nnUNetPredictor(perform_everything_on_device=gpu, device=torch.device(device), allow_tqdm=False)
    predictor.manual_initialization(network, plans, configuration, None, labels, model.trainer, run.mirroring)
    image = _first_case(run, configuration.data_identifier, dataset)  # (C, z, y, x)
    if image.shape[0] != channels:  # a cascade's second stage takes the first's segmentation too
        image = torch.cat([image, torch.zeros(channels - image.shape[0], *image.shape[1:])])
    for _ in range(2 if gpu else 1):  # on a GPU, cuDNN chooses its kernels in the first prediction
        begin = time.perf_counter()
        predictor.predict_sliding_window_return_logits(image).cpu()  # waits for the GPU
        results["seconds_per_case"] = time.perf_counter() - begin
    if gpu:
        del network, predictor
        network = trainer.build_network_architecture(plans, configuration, channels, heads, True).to(device)
        results["memory_gib"] = _training_memory(network, patch.expand(configuration.batch_size, *patch.shape[1:]))
    return results


def count_flops(network, patch) -> int:
    """Floating-point operations of one forward without gradients."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(patch)
    return counter.get_total_flops()


def _first_case(run: Run, identifier: str, dataset: str):
    import torch

    folder = nnunet_folder("preprocessed") / dataset / check_plain_name(identifier, "--measure: data_identifier in the plans")
    return torch.from_numpy(read_voxels(folder, min(run.predictions))).float()  # (C, z, y, x)


def _training_memory(network, batch) -> float:
    import torch

    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.99, nesterov=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the optimiser's state is there from the second step on
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda"):
            loss = sum(output.float().mean() for output in network.train()(batch.contiguous()))
        loss.backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated() / 1024**3
