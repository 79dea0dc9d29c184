"""L2GNet's module: trainable references that stand for parts of each class, moved by what they collect from the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nnunet_l2g.architectures.l2gnet.sinkhorn import sinkhorn_potentials
from nnunet_l2g.architectures.l2gnet.token_labels import balanced_weights, token_labels
from nnunet_l2g.architectures.l2gnet.vector_quantizer import VectorQuantizer
from nnunet_l2g.training.distributed import from_rank_0, sum_over_ranks
from nnunet_l2g.training.kmeans import kmeans_centres
from nnunet_l2g.training.precision import full_precision

CODES_PER_REFERENCE = 4  # K / p
TEMPERATURE = 0.1  # tau of the read-out, the contrastive loss and the shares
WITHIN_CLASS = (0.05, 10)  # eps and T of the transport that assigns tokens to the references of their class
WHOLE_IMAGE = (0.1, 5)  # eps and T of the transport of all tokens to all references
WEIGHT = 0.3  # of the loss
COMPACTNESS = 0.1  # weight of the second term, inside the loss
NORM = 0.1  # of a reference when it is placed
DECAY = 0.99  # of the counts of codes in classes, from which the references are placed
SMALLEST = 1e-30  # divisor


class ClassReferences(nn.Module):
    r"""M trainable references for each class, at one level of the decoder [1, 2, 3].

    docs/methods/l2gnet.md says which parts are inferred.

    A token is :math:`e_i = \mathrm{unit}(W f_i)` with an affine W, a reference has the direction :math:`\hat r = r / |r|`, and
    :math:`s_{i,cm} = e_i \cdot \hat r_{cm}` is their cosine. :math:`q_i` is the code of a token (VectorQuantizer). Codes are
    transported to the references and collected. Loss and read-out use the tokens.

    Collection, in training and prediction, without labels and without gradient, with b the shares of this image:

    .. math::
        P_{i,cm} = \mathrm{softmax}_{cm}(s(q_i) / \tau), \quad b = \mathrm{mean}_i P_i, \quad
        A = \mathrm{Sinkhorn}(s(q) / 0.1;\ 1/n,\ b) / b

        g_{cm} = \sum_i A_{i,cm} \Big(\sum_{m'} P_{i,cm'}\Big) q_i, \quad
        r'_{cm} = \mathrm{unit}(\hat r_{cm} + \beta\, g_{cm})

    A column of A sums to 1, also where the class is absent. The sum over m' is the probability that a token is of the class at
    all. Without this factor, a patch that holds only background would pull the references of every structure to the background.

    Read-out: :math:`\max_m e_i \cdot r'_{cm} / \tau` for each class; for a region, the value inside minus the value outside.

    Loss, with labels: within each class of an image, :math:`A^c = \mathrm{Sinkhorn}(s_{i \in c} / 0.05)` with uniform marginals
    over the class's tokens and its M references assigns :math:`a_i = \arg\max_m A^c_{im}`, without gradient. Then

    .. math::
        L = 0.3 \sum_i w_i \big(\mathrm{CE}(s_i / \tau, a_i) + 0.1\, (1 - s_{i, a_i})^2\big) + L_{commit}

    with weights :math:`w_i` that give every class of an image the same weight.

    Parameters
    ----------
    channels : int
        C of the features f.
    outputs : int
        Number of outputs of the network: classes, or regions.
    regions : bool
        Outputs are regions, which may overlap. Each region is a set of its own, with two classes, outside and inside.
    per_class : int
        M.
    dim : int
        d.
    codebook, nearest, moved, readout : bool
        Ablations. codebook False: the tokens themselves are transported. nearest True: the nearest reference replaces both
        transports. moved False: r' = r. readout False: losses only.

    Shapes
    ------
    forward: (B, C, *spatial) -> evidence (B, outputs, *spatial), or None without read-out. It is float32 (or float64) under
    autocast too, and whatever the parameters' dtype is.

    Raises
    ------
    ValueError
        If per_class or dim is under 1.
    FloatingPointError
        If features are not finite in training on the CPU, before they reach the codebook.

    References
    ----------
    .. [1] Gorade et al. L2GNet. arXiv 2502.05229.  [2] Mialon et al. OTKE. ICLR 2021.  [3] Zhou et al. Rethinking semantic
       segmentation: a prototype view. CVPR 2022.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        regions: bool = False,
        per_class: int = 5,
        dim: int = 32,
        codebook: bool = True,
        nearest: bool = False,
        moved: bool = True,
        readout: bool = True,
    ):
        super().__init__()
        for name, value in (("per_class (M)", per_class), ("dim (d)", dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.outputs, self.regions, self.nearest, self.readout = outputs, regions, nearest, readout
        sets, classes = (outputs, 2) if regions else (1, outputs)
        self.project = nn.Linear(channels, dim)  # W, b: a 1x1 convolution for 2D and 3D alike
        self.references = nn.Parameter(NORM * unit(torch.randn(sets, classes, per_class, dim)))  # r (S, G, M, d)
        self.beta = nn.Parameter(torch.tensor(0.3)) if moved and readout else None
        self.quantizer = None
        if codebook:
            codes = CODES_PER_REFERENCE * sets * classes * per_class
            self.quantizer = VectorQuantizer(codes, dim)
            self.register_buffer("class_counts", torch.zeros(sets, classes, codes))
        self.register_buffer("placed", self.references.detach().clone())  # where the references last started from
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("used", torch.zeros(self.references.shape[:3]), persistent=False)  # since the last diagnostics
        self.placement_step = 250  # optimiser steps after which the references are placed: features drift quickly at first
        self._steps: int | None = None  # copy of `steps` on the CPU: to read the buffer would make the CPU wait in every step
        self._forget()

    def _forget(self) -> None:
        self._last: tuple | None = None  # of the last training forward: tokens (B, d, n) with gradient, codes (B, n), grid
        self._counts: torch.Tensor | None = None  # class_counts of the last step alone
        self._labels: torch.Tensor | None = None  # (B, S, n) of the last step

    def _steps_done(self) -> int:
        if self._steps is None:
            self._steps = int(self.steps)
        return self._steps

    # ---- forward ----

    def forward(self, f: torch.Tensor) -> torch.Tensor | None:
        if self.training and f.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(torch.isfinite(f).all()):
            raise FloatingPointError("the feature map has NaN or Inf values")
        with full_precision(f.device.type):
            e, codes, moved = self.relate(f)
            self._last = (e, codes, tuple(f.shape[2:])) if self.training else None
            if not self.readout:
                return None
            # computed again in the backward: n times p cosines are more than the features of this level
            best = _recomputed(self._best, e, moved)  # (B, S, G, n)
            evidence = best[:, :, 1] - best[:, :, 0] if self.regions else best[:, 0]  # (B, outputs, n)
            return (evidence / TEMPERATURE).unflatten(2, f.shape[2:])

    def relate(self, f: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Tokens e (B, d, n), their codes (B, n) or None, and the references r' (B, S, G, M, d) moved by this image."""
        e = _recomputed(self._tokens, f)
        codes = None if self.quantizer is None else self.quantizer(e.transpose(1, 2))
        directions = unit(self.references.to(e.dtype))[None]  # (1, S, G, M, d)
        if self.beta is None:
            return e, codes, directions
        return e, codes, unit(directions + self.beta.to(e.dtype) * self.collect(e, codes, directions[0]))

    def _tokens(self, f: torch.Tensor) -> torch.Tensor:
        """(B, C, *spatial) -> (B, d, n)."""
        f = f.flatten(2).to(torch.promote_types(f.dtype, torch.float32))
        return unit(self.project.weight.to(f.dtype) @ f + self.project.bias.to(f.dtype)[:, None], 1)

    def _best(self, e: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """The largest cosine of each token (B, d, n) with the references (B or 1, S, G, M, d) of each class: (B, S, G, n)."""
        return (references.flatten(1, 3) @ e).unflatten(1, references.shape[1:4]).amax(3)

    @torch.no_grad()
    def collect(self, e: torch.Tensor, codes: torch.Tensor | None, directions: torch.Tensor) -> torch.Tensor:
        """g (B, S, G, M, d): what references (S, G, M, d) of norm 1 collect from tokens (B, d, n) with codes (B, n) or None."""
        batch, _, n = e.shape
        if codes is None:
            rows, weights = e.transpose(1, 2), e.new_full((batch, n), 1 / n)  # (B, R, d), (B, R); R is n, or K
        else:  # tokens with the same code have the same row in the plan, so K rows with the counts as weights are enough
            rows = self.quantizer.codebook.to(e.dtype)[None]  # (1, R, d)
            weights = e.new_zeros(batch, rows.shape[1]).scatter_add(1, codes, e.new_full((batch, n), 1 / n))
        s = (unit(rows)[:, None] @ directions.flatten(1, 2).transpose(1, 2)) / TEMPERATURE  # (B or 1, S, R, p), p = G M
        shares = s.softmax(3)  # P
        if self.nearest:
            columns = weights[:, None, :, None] * (s == s.amax(3, keepdim=True))  # (B, S, R, p)
            columns = columns / columns.sum(2, keepdim=True).clamp_min(SMALLEST)
        else:
            eps, iterations = WHOLE_IMAGE
            kernel = s * (TEMPERATURE / eps)
            b = (weights[:, None, :, None] * shares).sum(2)  # (B, S, p)
            u, _ = sinkhorn_potentials(kernel, weights[:, None], b, iterations, bound=1 / eps)  # (B, S, R)
            columns = (kernel + u[..., None]).softmax(2)  # A; v and b cancel
        of_class = shares.unflatten(3, directions.shape[1:3]).sum(4)  # (B or 1, S, R, G)
        columns = columns * of_class.repeat_interleave(directions.shape[2], 3)
        return (columns.transpose(2, 3) @ rows[:, None]).unflatten(2, directions.shape[1:3])

    # ---- loss ----

    def loss(self, target: torch.Tensor | None) -> torch.Tensor | None:
        """L () of the last training forward against a target of nnU-Net's loss; L_commit if it is None; None in eval."""
        if self._last is None:
            return None
        e, codes, grid = self._last
        with full_precision(e.device.type):
            commitment = 0.0 if codes is None else _recomputed(self.quantizer.commitment, e.transpose(1, 2), codes)
            if target is None:
                return commitment if codes is not None else None
            labels = token_labels(target, self.outputs, grid, self.regions)  # (B, S, n)
            weights = balanced_weights(labels, self.references.shape[1]).to(e.dtype)  # (B, S, n)
            assigned = self._assign(e, labels)  # (B, S, n)
            self._labels = labels
            if codes is not None and self._steps_done() < self.placement_step:
                self._counts = torch.zeros_like(self.class_counts)  # (S, G, K)
                self._count(self._counts, labels.clamp_min(0) * self._counts.shape[2] + codes[:, None], labels)
            return _recomputed(self._contrast, e, assigned, weights / assigned.shape[:2].numel()) + commitment

    def _contrast(self, e: torch.Tensor, assigned: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        sets = len(self.references)
        s = (unit(self.references.to(e.dtype)).flatten(0, 2) @ e).unflatten(1, (sets, -1))  # (B, S, p, n)
        contrast = F.cross_entropy((s / TEMPERATURE).flatten(0, 1), assigned.flatten(0, 1), reduction="none")  # (B S, n)
        compactness = (1 - s.gather(2, assigned[:, :, None])[:, :, 0]).square()  # (B, S, n)
        return WEIGHT * (weights * (contrast.view_as(compactness) + COMPACTNESS * compactness)).sum()

    @torch.no_grad()
    def _assign(self, e: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The reference c M + m of its own class c for each token (B, d, n) with a label (B, S, n): (B, S, n)."""
        _, classes, per_class, _ = self.references.shape
        label = labels.clamp_min(0)  # (B, S, n)
        s = (unit(self.references.to(e.dtype)).flatten(0, 2) @ e).unflatten(1, self.references.shape[:3])  # (B, S, G, M, n)
        own = s.gather(2, label[:, :, None, None].expand(-1, -1, 1, per_class, -1))[:, :, 0]  # (B, S, M, n)
        own = (own / WITHIN_CLASS[0]).exp()  # at most e^20
        members = (labels[:, :, None] == torch.arange(classes, device=labels.device)[:, None]).to(e.dtype)  # (B, S, G, n)
        v = own.new_ones(*own.shape[:3], classes)  # (B, S, M, G)
        for _ in range(0 if self.nearest else WITHIN_CLASS[1]):  # Sinkhorn of all classes at once
            sent = own * (v @ members)  # (B, S, M, n)
            sent = sent / sent.sum(2, keepdim=True).clamp_min(SMALLEST)  # each token sends 1
            v = v / (sent @ members.transpose(2, 3)).clamp_min(SMALLEST)  # each reference of a class receives the same
            v = v / v.amax(2, keepdim=True)  # a factor for all references of a class changes no plan, and would grow
        # max, as argmax over a dimension that is not the last one is ten times slower on a CPU
        assigned = label * per_class + (own * (v @ members)).max(2).indices
        self._count(self.used, assigned, labels)
        return assigned

    def _count(self, into: torch.Tensor, index: torch.Tensor, labels: torch.Tensor) -> None:
        """into (S, ...)[s, index] += 1 for each token (B, S, n) that has a label."""
        each = into[0].numel() * torch.arange(len(into), device=index.device)[:, None]  # (S, 1)
        into.view(-1).index_add_(0, (index + each).flatten(), (labels >= 0).to(into.dtype).flatten())

    def _members(self, e: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All tokens (B n, d), and which of them are of which class (S, G, B n)."""
        classes = torch.arange(self.references.shape[1], device=labels.device)[:, None]  # (G, 1)
        members = (labels.transpose(0, 1).flatten(1)[:, None] == classes).to(e.dtype)
        return e.transpose(1, 2).flatten(0, 1), members

    # ---- after the optimiser's step ----

    @torch.no_grad()
    def after_step(self) -> list[nn.Parameter]:
        """Moves the codebook and the counts, and places the references once. Returns the parameters that were placed."""
        if self._last is None:  # there was no training forward since the last step
            return []
        e, labels, counts = self._last[0].detach(), self._labels, self._counts
        self._forget()
        self._steps = self._steps_done() + 1
        self.steps += 1
        if self.quantizer is not None and self._steps == 1:
            self.quantizer.initialise(e.transpose(1, 2))
            self.quantizer.pending = None  # these codes belong to the codebook before
            return []
        if self.quantizer is not None:
            restarted = self.quantizer.update()  # (K,)
            if counts is not None:
                self.class_counts.lerp_(sum_over_ranks(counts), 1 - DECAY)
                self.class_counts.masked_fill_(restarted, 0)
        if self._steps != self.placement_step or labels is None:
            return []
        rows, members = (self.quantizer.codebook, self.class_counts) if self.quantizer else self._members(e, labels)
        for references, of_class in zip(self.references.flatten(0, 1), members.flatten(0, 1), strict=True):  # (M, d), (R,)
            mine = of_class > 1e-3 * of_class.sum()
            if bool(mine.any()):  # a class that did not occur keeps its references
                centres = kmeans_centres(unit(rows[mine].float()), len(references), of_class[mine].float())
                references.copy_(NORM * unit(centres))
        self.references.copy_(from_rank_0(self.references.detach()))
        self.placed.copy_(self.references)
        return [self.references]

    # ---- diagnostics ----

    @property
    def diagnostic_keys(self) -> list[str]:
        codes = [] if self.quantizer is None else list(self.quantizer.diagnostic_keys)
        return ["references_used", "reference_drift", "moved_by_image", *codes]

    @torch.no_grad()
    def diagnostics(self, moved: torch.Tensor) -> dict[str, float]:
        """Numbers since the last call, and of the references r' (B, S, G, M, d) of an image.

        references_used: how many references had a token assigned. reference_drift: 1 minus the mean cosine to where they were
        placed. moved_by_image: mean of the norm of r' - r, 0 to 2. perplexity, codes_used: see VectorQuantizer.
        """
        used = float((self.used > 0).sum())
        self.used.zero_()
        here, placed = unit(self.references.detach().double()), unit(self.placed.double())
        return {
            "references_used": used,
            "reference_drift": float(1 - (here * placed).sum(3).mean()),
            "moved_by_image": float((moved.double() - here).norm(dim=-1).mean()),
            **({} if self.quantizer is None else self.quantizer.diagnostics()),
        }

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._steps = None

    def __getstate__(self):
        return {**self.__dict__, "_last": None, "_counts": None, "_labels": None}  # a copy does not hold the last batch


def unit(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """x / |x|. The lower bound of 1e-5 for the norm keeps the gradient finite for tokens and references of 0."""
    return x * x.square().sum(dim, keepdim=True).clamp_min(1e-10).rsqrt()


def _recomputed(function, *arguments):
    """function(*arguments). Only the arguments are kept for the backward, which computes the rest again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
