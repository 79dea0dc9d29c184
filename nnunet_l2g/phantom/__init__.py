"""A seeded short-axis cardiac phantom: images and labels as SimpleITK images, and whole nnU-Net raw datasets of them.

It needs no download and has an exact reference. A training of minutes on a CPU can learn it, and it is not trivial: there are
look-alike organs, noise, a bias field, anisotropic voxels and an oblique grid. It is no model of real anatomy.
"""

from nnunet_l2g.phantom.case import CONTRASTS, LABELS, make_case, make_channels
from nnunet_l2g.phantom.dataset import write_dataset

__all__ = ["CONTRASTS", "LABELS", "make_case", "make_channels", "write_dataset"]
