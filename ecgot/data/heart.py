"""A beating heart as a moving dipole, and the 12 leads that record it.

Each wave of a beat (P, the parts of QRS, ST, T) is a Gaussian in time times a dipole vector in the Frank
frame (x to the left, y to the feet, z to the back). The dipole reaches the leads through Dower's matrix.

Sources: McSharry et al. 2003, "A dynamical model for generating synthetic electrocardiogram signals"
(Gaussian waves); Sameni et al. 2007, "Multichannel ECG and noise modeling" (the dipole form); Dower et al.
1980, "On deriving the electrocardiogram from vectorcardiographic leads" (the matrix from Frank's leads).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

# Rows V1-V6, I, II; columns x, y, z. The other four leads follow from I and II.
DOWER = np.array(
    [
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
    ]
)
SECONDS = 10.0  # length of every ECG
Vector = tuple[float, float, float]  # x, y, z


@dataclass(frozen=True)
class Wave:
    """A Gaussian of standard deviation ``width_s``, ``time_s`` after the R peak, along ``dipole`` (mV)."""

    time_s: float
    width_s: float
    dipole: Vector


@dataclass(frozen=True)
class Heart:
    """The waves of one beat, and the rhythm."""

    p: tuple[Wave, ...] = (Wave(-0.170, 0.022, (0.05, 0.09, -0.03)), Wave(-0.145, 0.022, (0.06, 0.07, 0.04)))
    qrs: tuple[Wave, ...] = (
        Wave(-0.026, 0.008, (-0.12, -0.05, -0.28)),  # septum: right and forward
        Wave(0.000, 0.012, (1.10, 0.80, 0.25)),  # free walls: left, down
        Wave(0.028, 0.010, (-0.10, -0.22, 0.50)),  # base: back and up
    )
    st: tuple[Wave, ...] = ()
    t: tuple[Wave, ...] = (Wave(0.230, 0.050, (0.16, 0.12, -0.08)), Wave(0.285, 0.032, (0.18, 0.14, -0.08)))
    rate_bpm: float = 72.0
    irregularity: float = 0.02  # standard deviation of RR over its mean, beat by beat
    breathing: float = 0.02  # relative swing of RR with respiration
    fibrillates: bool = False
    ectopic_share: float = 0.0  # share of beats followed by a premature ventricular one
    ectopic_by_s: float = 3.0  # if there are any, the first comes before the first beat after this

    def scaled(self, part: str, factors: Vector) -> "Heart":
        """The heart with the dipoles of one part scaled by axis."""
        x, y, z = factors
        waves: dict[str, Any] = {
            part: tuple(
                replace(w, dipole=(w.dipole[0] * x, w.dipole[1] * y, w.dipole[2] * z))
                for w in getattr(self, part)
            )
        }
        return replace(self, **waves)

    def adding(self, part: str, *waves: Wave) -> "Heart":
        """The heart with ``waves`` added to one part."""
        return replace(self, **{part: getattr(self, part) + waves})


@dataclass(frozen=True)
class Beat:
    """When a beat's R peak comes, how long after the last, and whether it is a premature ventricular one."""

    peak_s: float
    rr_s: float
    premature: bool


def draw_orientation(rng: np.random.Generator) -> np.ndarray:
    """A patient's heart orientation [3, 3]: rotated by some degrees about each axis, and slightly scaled."""
    matrix = np.eye(3) * np.exp(rng.normal(0.0, 0.12))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        angle = np.radians(rng.normal(0.0, 9.0))
        turn = np.eye(3)
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def moving_dipole(
    heart: Heart, rng: np.random.Generator, fs_hz: float
) -> tuple[np.ndarray, tuple[Beat, ...]]:
    """The heart's dipole [T, 3] in mV over SECONDS, and its beats from before 0 s to after SECONDS."""
    time = np.arange(round(SECONDS * fs_hz)) / fs_hz
    ectopic_waves = _ectopic_waves(rng)
    beats = _beats(heart, rng)
    centers, widths, dipoles = [], [], []
    for beat in beats:
        # QT follows the square root of RR (Bazett); P and QRS keep their timing.
        stretch = np.sqrt(beat.rr_s)
        gain = np.exp(rng.normal(0.0, 0.03))
        early = ectopic_waves if beat.premature else heart.p + heart.qrs
        late = () if beat.premature else heart.st + heart.t
        for wave, factor in [(w, 1.0) for w in early] + [(w, stretch) for w in late]:
            centers.append(beat.peak_s + wave.time_s * factor)
            widths.append(wave.width_s * factor)
            dipoles.append(times(wave.dipole, gain))
    offsets = (time[:, None] - np.array(centers)) / np.array(widths)
    return np.exp(-0.5 * offsets**2) @ np.array(dipoles) + _flutter(heart, rng, time), beats


def _beats(heart: Heart, rng: np.random.Generator) -> tuple[Beat, ...]:
    mean = 60.0 / heart.rate_bpm
    breath_hz, phase = rng.uniform(0.2, 0.3), rng.uniform(0, 2 * np.pi)
    peak = -rng.uniform(0.2, 1.0) * mean - 0.5
    beats: list[Beat] = []
    # If the report mentions extra beats, the ECG shows at least one.
    due = heart.ectopic_share > 0
    while peak < SECONDS + 0.5:
        swing = 1 + heart.breathing * np.sin(2 * np.pi * breath_hz * peak + phase)
        rr = max(0.3, mean * swing * (1 + rng.normal(0.0, heart.irregularity)))
        peak += rr
        beats.append(Beat(peak, rr, premature=False))
        sure = due and peak > heart.ectopic_by_s
        if heart.ectopic_share and 0.3 < peak < SECONDS - 1 and (sure or rng.random() < heart.ectopic_share):
            due = False
            early = rng.uniform(0.55, 0.7) * rr
            beats.append(Beat(peak + early, early, premature=True))
            peak += rr  # the sinus beat under the extra one is blocked: a full compensatory pause
    return tuple(beats)


def _ectopic_waves(rng: np.random.Generator) -> tuple[Wave, ...]:
    """A wide beat from one ventricle, its T wave opposite to it."""
    direction = rng.normal(size=3)
    x, y, z = 1.5 * direction / np.linalg.norm(direction)
    return (
        Wave(-0.03, 0.025, (0.5 * x, 0.5 * y, 0.5 * z)),
        Wave(0.025, 0.030, (x, y, z)),
        Wave(0.27, 0.060, (-0.35 * x, -0.35 * y, -0.35 * z)),
    )


def _flutter(heart: Heart, rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Fibrillatory waves [T, 3]: 4-9 Hz with a wandering frequency, largest towards V1."""
    if not heart.fibrillates:
        return np.zeros((len(time), 3))
    frequency = rng.uniform(4.5, 8.5) + np.cumsum(rng.normal(0, 0.05, len(time)))
    angle = 2 * np.pi * np.cumsum(np.clip(frequency, 4, 9)) * (time[1] - time[0])
    size = rng.uniform(0.04, 0.1) * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.2, 0.6) * time))
    return (size * np.sin(angle))[:, None] * np.array([-0.3, 0.4, -1.0])


def leads_mv(dipole: np.ndarray) -> np.ndarray:
    """dipole [T, 3] to the 12 leads [12, T] in the order of STANDARD_LEADS."""
    v1_to_v6_i_ii = DOWER @ dipole.T
    chest, first, second = v1_to_v6_i_ii[:6], v1_to_v6_i_ii[6], v1_to_v6_i_ii[7]
    limb = [
        first,
        second,
        second - first,
        -(first + second) / 2,
        first - second / 2,
        second - first / 2,
    ]
    return np.concatenate([np.stack(limb), chest])


def noise_mv(rng: np.random.Generator, samples: int, fs_hz: float) -> np.ndarray:
    """Baseline wander and muscle noise [12, T] in mV; each electrode has its own."""
    time = np.arange(samples) / fs_hz
    wander = np.zeros((12, samples))
    for _ in range(2):
        frequency, phase = rng.uniform(0.1, 0.45), rng.uniform(0, 2 * np.pi, (12, 1))
        wander += rng.normal(0, 0.025, (12, 1)) * np.sin(2 * np.pi * frequency * time + phase)
    return wander + rng.normal(0.0, rng.uniform(0.005, 0.02), (12, samples))


def times(vector: Vector, factor: float) -> Vector:
    """``vector`` scaled by ``factor``."""
    return vector[0] * factor, vector[1] * factor, vector[2] * factor
