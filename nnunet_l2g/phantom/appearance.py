"""How tissues look: mean intensity per contrast, then texture, bias field and Rician noise."""

from __future__ import annotations

import numpy as np

from nnunet_l2g.phantom import anatomy as a

# Mean signal of each tissue (1 is the brightest). Cine: bright blood, dark muscle. Late enhancement: nulled (darkest)
# myocardium, grey blood, bright scar. In cine a scar cannot be told from myocardium, as in practice. Black blood (T2-weighted
# spin echo): dark blood, brighter muscle, so a network that knows cine alone finds nothing.
CONTRASTS = {
    "cine": {
        a.AIR: 0.02,
        a.FAT: 0.75,
        a.MUSCLE: 0.32,
        a.LUNG: 0.08,
        a.LIVER: 0.42,
        a.VESSEL: 0.85,
        a.HEART_FAT: 0.62,
        a.RIGHT_WALL: 0.33,
        a.RIGHT_VENTRICLE: 0.78,
        a.MYOCARDIUM: 0.33,
        a.LEFT_VENTRICLE: 0.88,
        a.PAPILLARY: 0.36,
        a.SCAR: 0.33,
    },
    "late_enhancement": {
        a.AIR: 0.02,
        a.FAT: 0.66,
        a.MUSCLE: 0.22,
        a.LUNG: 0.06,
        a.LIVER: 0.33,
        a.VESSEL: 0.52,
        a.HEART_FAT: 0.58,
        a.RIGHT_WALL: 0.12,
        a.RIGHT_VENTRICLE: 0.46,
        a.MYOCARDIUM: 0.10,
        a.LEFT_VENTRICLE: 0.52,
        a.PAPILLARY: 0.14,
        a.SCAR: 0.95,
    },
    "black_blood": {
        a.AIR: 0.02,
        a.FAT: 0.85,
        a.MUSCLE: 0.40,
        a.LUNG: 0.06,
        a.LIVER: 0.36,
        a.VESSEL: 0.07,
        a.HEART_FAT: 0.78,
        a.RIGHT_WALL: 0.48,
        a.RIGHT_VENTRICLE: 0.10,
        a.MYOCARDIUM: 0.50,
        a.LEFT_VENTRICLE: 0.07,
        a.PAPILLARY: 0.46,
        a.SCAR: 0.66,
    },
}
NOISE = {"cine": (0.03, 0.06), "late_enhancement": (0.05, 0.09), "black_blood": (0.04, 0.08)}  # range of the standard deviation
# range of scanner units per unit of signal
GAIN = {"cine": (300.0, 700.0), "late_enhancement": (120.0, 400.0), "black_blood": (200.0, 500.0)}


def signal(tissue: np.ndarray, contrast: str) -> np.ndarray:
    """Mean signal per point (float64, the shape of `tissue`)."""
    table = np.zeros(max(CONTRASTS[contrast]) + 1)
    for code, value in CONTRASTS[contrast].items():
        table[code] = value
    return table[tissue]


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], waves: float, terms: int = 6) -> np.ndarray:
    """A smooth random field of mean 0 and standard deviation 1: plane waves of at most `waves` periods per axis.

    f(u) = sqrt(2 / terms) sum_k cos(2 pi <w_k, u> + phi_k), u in [0, 1]^dim, w_k uniform in [-waves, waves]^dim.
    """
    axes = np.meshgrid(*[np.linspace(0, 1, n) if n > 1 else np.zeros(1) for n in shape], indexing="ij", sparse=True)
    total = np.zeros(shape)
    for _ in range(terms):
        frequency, phase = rng.uniform(-waves, waves, len(shape)), rng.uniform(0, 2 * np.pi)
        total += np.cos(2 * np.pi * sum(w * u for w, u in zip(frequency, axes, strict=True)) + phase)
    return total * np.sqrt(2 / terms)


def acquire(rng: np.random.Generator, clean: np.ndarray, contrast: str) -> np.ndarray:
    """A scanner's image of the clean signal s: int16, in scanner units.

    image = gain | s (1 + 0.05 f_texture) exp(0.12 f_bias) + n_1 + i n_2 |, with n of standard deviation drawn from
    NOISE[contrast] (Rician magnitude), f smooth random fields: texture 10, bias 0.8 periods per axis.
    """
    textured = clean * (1 + 0.05 * smooth_field(rng, clean.shape, waves=10, terms=12))
    biased = textured * np.exp(0.12 * smooth_field(rng, clean.shape, waves=0.8))
    sigma = rng.uniform(*NOISE[contrast])
    magnitude = np.hypot(biased + sigma * rng.standard_normal(clean.shape), sigma * rng.standard_normal(clean.shape))
    return np.rint(np.clip(magnitude * rng.uniform(*GAIN[contrast]), 0, np.iinfo(np.int16).max)).astype(np.int16)
