"""One inspection: model, case, prediction, and what the model's own method can show."""

from __future__ import annotations

from pathlib import Path

from nnunet_l2g import __version__
from nnunet_l2g.inspect.case import read_case
from nnunet_l2g.inspect.domains import plans_for_domain
from nnunet_l2g.inspect.glua import as_trained, inspect_glua, load_parts
from nnunet_l2g.inspect.grcsf import inspect_grcsf
from nnunet_l2g.inspect.l2gnet import inspect_l2gnet
from nnunet_l2g.inspect.model import Model, load_model
from nnunet_l2g.inspect.output import Output
from nnunet_l2g.inspect.segmentation import inspect_segmentation, predict
from nnunet_l2g.inspect.view import View


def inspect_case(
    folder: Path, fold: str, checkpoint: str, images: list[Path], label: Path | None, output: Path, domain: str | None,
    device: str,
) -> Output:  # fmt: skip
    """Writes figures, NIfTI files and summary.json. UserError, before anything is written, for what cannot be used."""

    def plans_of(plans: dict, configuration: str) -> dict:
        nonlocal domain
        plans, domain = plans_for_domain(plans, configuration, domain)
        return plans

    model = load_model(folder, fold, checkpoint, plans_of)
    parts = load_parts(model) if model.method == "GLUA" and hasattr(model.trainer_class, "translation") else None
    case = read_case(model, images, label)
    case = case if parts is None else as_trained(case, parts, domain)
    written = Output.open(output)
    print(f"{model.trainer}, fold {fold}: case {case.name} on {device}{_domain_line(model, domain)}", flush=True)
    if case.warning:
        print(f"WARNING: {case.warning}", flush=True)
    prediction = predict(model, case, device)
    view = View(model, case, prediction)
    summary = {
        "version": __version__,
        "model": str(folder),
        "fold": fold,
        "checkpoint": model.file.name,
        "trainer": model.trainer,
        "method": model.method,
        "domain": domain,
        "images": [str(path) for path in case.files],
        "reference": None if label is None else str(label),
        "warning": case.warning or None,
        "device": device,
        "slice": view.index,
        "segmentation": inspect_segmentation(model, case, view, written),
    }
    if model.method == "L2GNet":
        summary["l2gnet"] = inspect_l2gnet(model, case, view, device, written)
    elif model.method == "GRCSF":
        summary["grcsf"] = inspect_grcsf(model, case, view, device, written)
    elif parts is not None:
        summary["glua"] = inspect_glua(model, case, view, parts, domain or "source", device, written)
    written.write_summary(summary)
    return written


def _domain_line(model: Model, domain: str | None) -> str:
    if domain is None:
        return ""
    schemes = ", ".join(model.configuration.normalization_schemes)
    other = "target" if domain == "source" else "source"
    return f"\n  taken as an image of the {domain} (normalisation {schemes}); --domain {other} if it is not"
