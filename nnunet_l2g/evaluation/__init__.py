"""How well a segmentation agrees with its reference: overlap, surfaces, lesions; one case or a folder of cases."""

from nnunet_l2g.evaluation.lesions import LesionMatch, match_lesions, recall_by_size
from nnunet_l2g.evaluation.overlap import count_voxels, overlap_scores
from nnunet_l2g.evaluation.surfaces import surface_scores

__all__ = ["LesionMatch", "count_voxels", "match_lesions", "overlap_scores", "recall_by_size", "surface_scores"]
