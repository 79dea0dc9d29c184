"""A seeded short-axis cardiac phantom: images and labels as SimpleITK images, and whole nnU-Net raw datasets of them.

It needs no download, has an exact reference, and is drawn to be easy enough for a training of minutes on a CPU and not
trivial: look-alike organs, noise, bias field, anisotropic voxels, an oblique grid. It is no model of real anatomy.
"""

from nnunet_l2g.phantom.appearance import CONTRASTS
from nnunet_l2g.phantom.case import LABELS, make_case, make_channels
from nnunet_l2g.phantom.dataset import write_dataset

__all__ = ["CONTRASTS", "LABELS", "make_case", "make_channels", "write_dataset"]
