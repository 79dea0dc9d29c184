"""Where the domains differ: the weight of each position in the alignment of features."""

from __future__ import annotations

import torch


def local_feature_mask(score: torch.Tensor) -> torch.Tensor:
    r""":math:`m = \mathrm{clip}(|2 D(f) - 1|, 0, 1)`: 0 where the discriminator cannot tell the domains apart, 1 where it can.

    Detached: the mask chooses what is aligned, no gradient makes it small. GLUA [1] has such a mask by its abstract; this
    form is inferred (docs/methods).

    Parameters
    ----------
    score : (B, 1, *spatial)
        D(f), trained to 1 on source and 0 on target.

    Returns
    -------
    (B, 1, *spatial) in [0, 1], without gradient

    References
    ----------
    .. [1] Su et al. Mind The Gap: alleviating local imbalance for unsupervised cross-modality medical image segmentation.
       arXiv 2205.11888; IEEE JBHI.
    """
    return (2 * score.detach() - 1).abs().clamp(0, 1)
