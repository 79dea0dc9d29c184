"""L2GNet's transport on one patch: the plan beside the exact one, and what each reference collects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nnunet_l2g.inspection.drawing import save_figure
from nnunet_l2g.inspection.output import Output

ALIKE = 0.95  # cosine of two references' columns above which one picture is enough


@dataclass(frozen=True)
class Plan:
    """Of one patch: scores S and columns A (n, p), tokens q and output o (n, d); eps, iterations T of the layer.

    received (p,) : which share of the tokens each reference receives, 1 / p with uniform marginals
    relaxed : the column marginal is a wish, so there is no exact plan to compare with
    """

    scores: np.ndarray
    columns: np.ndarray
    tokens: np.ndarray
    output: np.ndarray
    eps: float
    iterations: int
    received: np.ndarray
    relaxed: bool = False

    @property
    def mass(self) -> np.ndarray:
        """Pi (n, p), which sums to 1."""
        return self.columns * self.received

    @property
    def has_exact(self) -> bool:
        return self.iterations > 0 and not self.relaxed

    @property
    def effective_tokens(self) -> np.ndarray:
        """exp of the entropy of each column, (p,): over how many tokens a reference's mass is spread."""
        columns = np.maximum(self.columns, 1e-30)
        return np.exp(-(columns * np.log(columns)).sum(0))

    @property
    def order(self) -> tuple[np.ndarray, np.ndarray]:
        """For pictures: tokens (n,) by the reference that takes most of them, references (p,) the most concentrated first."""
        columns = np.argsort(self.effective_tokens, kind="stable")
        return np.lexsort((-self.columns.max(1), np.argsort(columns)[self.columns.argmax(1)])), columns

    @property
    def top(self) -> list[int]:
        """References, the most concentrated first, those left out that collect like one before (cosine over 0.95)."""
        unit = self.columns / np.linalg.norm(self.columns, axis=0)
        chosen: list[int] = []
        for reference in np.argsort(self.effective_tokens, kind="stable"):
            if all(unit[:, reference] @ unit[:, other] <= ALIKE for other in chosen):
                chosen.append(int(reference))
        return chosen


def measure_plan(plan: Plan) -> dict:
    """Numbers of a plan Pi, and of the exact one with its column marginal by POT where the layer transports (T > 0).

    objective : <Pi, S>, of the layer's plan, of the exact plan and of the product of the marginals, which knows no scores
    reached : (layer - product) / (exact - product)
    """
    n, p = plan.columns.shape
    rows = plan.mass.sum(1)  # (n,), tend to 1 / n
    found = {
        "tokens": n,
        "references": p,
        "eps": plan.eps,
        "iterations": plan.iterations,
        "marginal_error": float(np.abs(rows * n - 1).max()),
        "kept_variance": float(plan.output.var(0).sum() / max(plan.tokens.var(0).sum(), 1e-30)),
        "tokens_per_reference": float(plan.effective_tokens.mean()),
        "distinct_references": len(plan.top),
    }
    if plan.has_exact:
        layer, product = float((plan.mass * plan.scores).sum()), float((plan.scores * plan.received).sum() / n)
        exact = float((exact_plan(plan.scores, plan.received) * plan.scores).sum())
        reached = (layer - product) / (exact - product) if exact > product else None
        found["objective"] = {
            "layer": layer, "exact": exact, "product": product, "difference": layer - exact, "reached": reached,
        }  # fmt: skip
    return found


def exact_plan(scores: np.ndarray, received: np.ndarray) -> np.ndarray:
    """The plan (n, p) that maximises <Pi, S> with columns that sum to received (p,), without entropy: POT's network simplex."""
    import ot  # large, and only needed here

    return ot.emd(np.full(len(scores), 1 / len(scores)), received / received.sum(), -scores.astype(np.float64))


def draw_plan(plan: Plan, found: dict, prefix: str, output: Output) -> None:
    """plan.png: the layer's plan, and beside it the exact one in the same order and colours."""
    n, p = plan.columns.shape
    error = f"largest marginal error {found['marginal_error']:.2g}"
    plans = [(f"plan of the layer: {_kind(plan)}\n{error}", plan.mass * n * p)]
    if plan.has_exact:
        exact = exact_plan(plan.scores, plan.received)
        plans.append(("exact plan: network simplex, no entropy\nmarginals hold", exact * n * p))
    highest = max(float(np.quantile(values, 0.999)) for _, values in plans)

    def draw(figure):
        from matplotlib.colors import PowerNorm

        norm = PowerNorm(0.5, 0, highest)
        axes = figure.subplots(1, len(plans), squeeze=False, sharey=True)[0]
        for axis, (title, values) in zip(axes, plans, strict=True):
            drawn = axis.imshow(values[np.ix_(*plan.order)], cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
            axis.set(title=title, xlabel=f"{p} references, most concentrated first")
        axes[0].set_ylabel(f"{n} tokens, by the reference that takes most of them")
        figure.colorbar(drawn, ax=list(axes), label="mass, 1: as much as if all shared evenly", extend="max")

    text = "Transport plan of one patch; the marginal error is relative, of a token's mass."
    if plan.has_exact:
        objective = found["objective"]
        reached = "" if objective["reached"] is None else f", {objective['reached']:.0%} of the way from the even plan to it"
        text += (
            f" Objective <Plan, S>: layer {objective['layer']:.4f}, exact {objective['exact']:.4f}{reached} (even plan "
            f"{objective['product']:.4f})."
        )
    elif plan.relaxed:
        text += " Its column marginal is a wish, so there is no exact plan to compare with."
    else:
        text += " This twin has a softmax over tokens for each reference in the place of transport, so tokens have no marginal."
    path = output.add(f"{prefix}plan.png", "the transport plan of one patch, with the exact plan")
    save_figure(draw, (4.6 * len(plans) + 0.8, 4.6), path, text)


def _kind(plan: Plan) -> str:
    return f"Sinkhorn, eps {plan.eps:g}, T = {plan.iterations}" if plan.iterations else "softmax"


def collected_shares(plan: Plan, labels: np.ndarray, names: dict[int, str]) -> dict[str, np.ndarray]:
    """For each class and the background, the share (p,) of what each reference collects there.

    labels : (n, values) share of each token's voxels that have label 0, ... as columns in names' order, background first
    """
    shares = plan.columns.T @ labels  # (p, values)
    return dict(zip(["background", *names.values()], shares.T, strict=True))


def draw_classes(
    shares: dict[str, np.ndarray], sizes: np.ndarray, order: np.ndarray, of: str, prefix: str, output: Output
) -> None:
    """references_classes.png: references by classes; sizes (classes,) is the share of the patch that each class takes."""
    present = [(name, shares[name] / size) for name, size in zip(shares, sizes, strict=True) if size > 0]
    absent = [name for name, size in zip(shares, sizes, strict=True) if size == 0]

    def draw(figure):
        axes = figure.add_subplot()
        values = np.stack([values for _, values in present])[:, order]  # (classes, p)
        drawn = axes.imshow(values, cmap="viridis", vmin=0, vmax=max(2.0, values.max()), aspect="auto", interpolation="nearest")
        axes.set_yticks(range(len(present)), [name for name, _ in present])
        step = max(1, -(-len(order) // 32))
        axes.set_xticks(range(0, len(order), step), [str(number) for number in order[::step]], rotation=90, fontsize=7)
        axes.set_xlabel("reference, most concentrated first")
        figure.colorbar(drawn, ax=axes, label="times its even share")

    caption = (
        f"From which class of the {of} segmentation each reference collects, in one patch: 1 is as much as the class takes of "
        f"the patch, more is a preference for it{'; not in the patch: ' + ', '.join(absent) if absent else ''}."
    )
    path = output.add(f"{prefix}references_classes.png", "from which class each reference collects")
    save_figure(draw, (7.5, 1.7 + 0.3 * len(present)), path, caption)
