"""How well segmentations agree with their references: scores of one structure, of one case, of many cases."""

from nnunet_l2g.evaluation.scores import LesionMatch, count_voxels, match_lesions, overlap_scores, surface_scores

__all__ = ["LesionMatch", "count_voxels", "match_lesions", "overlap_scores", "surface_scores"]
