"""Unsupervised adaptation to a target without labels: target checks, fingerprint, preprocessing, adapted plans."""
