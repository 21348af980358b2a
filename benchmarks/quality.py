"""Rates of wrong and right verdicts on signals, and medians of measured intervals.

    python -m benchmarks.quality DATA                 # fold 8: verdicts, exchanges, intervals; made signals
    python -m benchmarks.quality DATA --fit           # weights of ecgot.data.electrodes, on folds 1-7
    python -m benchmarks.quality DATA --neurokit2     # the same questions to neurokit2, if it is installed

DATA is PTB-XL, or a data set in its layout, at 100 Hz.
"""

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from ecgot.data.complexes import at_work_rate, find_complexes, median_beat
from ecgot.data.electrodes import AFTER_S, BEFORE_S, EXCHANGES, lead_features
from ecgot.data.leads import STANDARD_LEADS, complete
from ecgot.data.measurements import measure
from ecgot.data.quality import assess
from ecgot.data.record import read_record
from ecgot.inference.verify import contradictions
from ecgot.text.cleaning import clean_report
from ecgot.text.glossary import plain_english
from ecgot.text.statements import sentences

SEED = 21
NOISES = ("static_noise", "burst_noise", "baseline_drift", "electrodes_problems")
RATES_HZ, SECONDS, SIZES_MV, LEADS = (100, 250, 500, 1000), (3, 10, 60), (0.1, 0.5, 2.0), (1, 2, 12)
DIAGNOSES = ("NORM", "1AVB", "CLBBB", "CRBBB", "LNGQT", "AFIB", "SBRAD", "STACH")
INTERVALS = ("heart_rate_bpm", "pr_ms", "qrs_ms", "qtc_ms")
Made = Callable[[np.random.Generator, np.ndarray, int], np.ndarray]


def white(rng: np.random.Generator, time_s: np.ndarray, leads: int) -> np.ndarray:
    """White noise [leads, T] of standard deviation 1."""
    return rng.normal(size=(leads, len(time_s)))


def walk(rng: np.random.Generator, time_s: np.ndarray, leads: int) -> np.ndarray:
    """A random walk [leads, T] of standard deviation 1."""
    steps = np.cumsum(rng.normal(size=(leads, len(time_s))), axis=1)
    return steps / steps.std(axis=1, keepdims=True)


def sine(rng: np.random.Generator, time_s: np.ndarray, leads: int) -> np.ndarray:
    """A sine wave [leads, T] of 0.2 to 40 Hz, each lead with its own phase."""
    return np.sin(_phase(rng, time_s, leads, float(np.exp(rng.uniform(np.log(0.2), np.log(40))))))


def square(rng: np.random.Generator, time_s: np.ndarray, leads: int) -> np.ndarray:
    """A square wave [leads, T] of 0.2 to 20 Hz."""
    return np.sign(np.sin(_phase(rng, time_s, leads, float(np.exp(rng.uniform(np.log(0.2), np.log(20)))))))


def hum(rng: np.random.Generator, time_s: np.ndarray, leads: int) -> np.ndarray:
    """Mains hum [leads, T]."""
    return np.sin(_phase(rng, time_s, leads, float(rng.choice([50, 60])) + rng.normal(0, 0.02)))


def microvolt(rng: np.random.Generator, time_s: np.ndarray, leads: int) -> np.ndarray:
    """Noise [leads, T] of 1 µV, for sizes of 0.1 to 2 mV less than 1 to 20 µV."""
    return 0.001 * rng.normal(size=(leads, len(time_s)))


def _phase(rng: np.random.Generator, time_s: np.ndarray, leads: int, hertz: float) -> np.ndarray:
    return 2 * np.pi * hertz * time_s + rng.uniform(0, 2 * np.pi, (leads, 1))


MADE: dict[str, Made] = {
    "white noise": white,
    "random walk": walk,
    "sine": sine,
    "square wave": square,
    "hum": hum,
    "1 µV": microvolt,
}


def made_signals(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, float]:
    """A signal [leads, T] in mV that is no ECG, and its rate; size, length, rate and leads are drawn.

    Every second one holds the same in all leads, every third some noise.
    """
    fs_hz, seconds = float(rng.choice(RATES_HZ)), float(rng.choice(SECONDS))
    leads, size_mv = int(rng.choice(LEADS)), float(rng.choice(SIZES_MV))
    signal = size_mv * MADE[kind](rng, np.arange(round(fs_hz * seconds)) / fs_hz, leads)
    if rng.random() < 0.5:
        signal = np.repeat(signal[:1], leads, axis=0)
    if rng.random() < 1 / 3 and kind != "1 µV":
        signal = signal + rng.normal(0, 0.03 * size_mv, signal.shape)
    return signal, fs_hz


def exchange(signal: np.ndarray, code: str) -> np.ndarray:
    """The twelve leads [12, T] as they would be with two electrodes exchanged."""
    first, second = {"arms_reversed": ("RA", "LA"), "right_arm_left_leg_reversed": ("RA", "LL")}[code]
    # Potentials against the mean of the three limb electrodes.
    potential = {"RA": -(signal[0] + signal[1]) / 3, "LA": (2 * signal[0] - signal[1]) / 3}
    potential["LL"] = -potential["RA"] - potential["LA"]
    potential[first], potential[second] = potential[second], potential[first]
    limbs = np.stack([potential["LA"] - potential["RA"], potential["LL"] - potential["RA"]])
    chest = signal[6:]
    return complete(np.concatenate([limbs, chest]), ("I", "II", *STANDARD_LEADS[6:]))[0]


def read_sample(root: Path, folds: Sequence[int], records: int) -> tuple[np.ndarray, pd.DataFrame]:
    """Signals [n, 12, T] of a fixed random sample of some folds, and their rows of the table."""
    table = pd.read_csv(root / "ptbxl_database.csv")
    table = table[table.strat_fold.isin(folds)]
    table = table.sample(n=min(records, len(table)), random_state=SEED)
    return np.stack([read_record(root / name).signal_mv for name in table.filename_lr]), table


def print_verdicts(signals: np.ndarray, table: pd.DataFrame) -> None:
    """How many records are refused, doubted, and why; and the same of some leads alone."""
    clean = table[[name for name in NOISES if name in table]].isna().all(axis=1).to_numpy()
    for name, rows in (("all", np.ones(len(clean), bool)), ("without remark on noise in the table", clean)):
        start = time.process_time()
        found = [assess(signal, 100.0, STANDARD_LEADS) for signal in signals[rows]]
        cost_ms = 1000 * (time.process_time() - start) / max(1, len(found))
        codes = Counter(remark.code for quality in found for remark in quality.remarks)
        print(
            f"{name}: {len(found)} records, {_verdicts(found)}, {dict(codes)}, {cost_ms:.1f} ms of CPU each"
        )
    for leads in (["I"], ["II"], ["V2"], ["I", "II"], ["I", "II", "V2"]):
        rows_of = [STANDARD_LEADS.index(lead) for lead in leads]
        print(f"{', '.join(leads)} alone: {_verdicts([assess(s[rows_of], 100.0, leads) for s in signals])}")
    for each in EXCHANGES:
        found = [assess(exchange(signal, each.code), 100.0, STANDARD_LEADS) for signal in signals]
        hits = np.mean([any(r.code == each.code for r in quality.remarks) for quality in found])
        print(f"{each.code}: found in {hits:.1%} of records with the electrodes exchanged")


def _verdicts(found: Sequence[object]) -> str:
    counts = Counter(getattr(quality, "verdict") for quality in found)  # noqa: B009
    return ", ".join(f"{counts[name]} {name}" for name in ("good", "doubtful", "refused"))


def print_made(seeds: int) -> None:
    """How many made signals of each kind are refused."""
    for number, kind in enumerate(MADE):
        found = []
        for seed in range(seeds):
            signal, fs_hz = made_signals(kind, np.random.default_rng([SEED, number, seed]))
            found.append(assess(signal, fs_hz, STANDARD_LEADS[: len(signal)]))
        print(f"{kind}: {_verdicts(found)} of {seeds}")


def print_intervals(signals: np.ndarray, table: pd.DataFrame) -> None:
    """Medians and deciles of what is measured, by diagnosis, and contradictions of the reports."""
    start = time.process_time()
    measured = [measure(signal, 100.0, STANDARD_LEADS) for signal in signals]
    print(f"measuring: {1000 * (time.process_time() - start) / len(signals):.1f} ms of CPU each")
    for code in DIAGNOSES:
        rows = np.flatnonzero(table.scp_codes.str.contains(f"'{code}'").to_numpy())
        print(
            f"{code}: {len(rows)} records; " + "; ".join(_deciles(measured, rows, name) for name in INTERVALS)
        )

    said = [sentences(plain_english(clean_report(str(text)))) for text in table.report]
    found = [
        each for texts, facts in zip(said, measured, strict=True) for each in contradictions(texts, facts, {})
    ]
    kinds = Counter(each.reason.split(";")[0] for each in found)
    print(f"the data set's own reports: {len(found)} contradictions, {dict(kinds)}")


def _deciles(measured: Sequence[object], rows: np.ndarray, name: str) -> str:
    values = [getattr(measured[row], name) for row in rows]
    known = [value for value in values if value is not None]
    if not known:
        return f"{name} none"
    low, middle, high = np.quantile(known, [0.1, 0.5, 0.9])
    return f"{name} {middle:.0f} ({low:.0f}-{high:.0f}), none in {len(values) - len(known)}"


def fit(signals: np.ndarray) -> None:
    """Print the weights of each exchange."""
    features = np.array([_features(signal) for signal in signals])
    for number, each in enumerate(EXCHANGES):
        right = features[:, number]
        model = LogisticRegression(fit_intercept=False)
        model.fit(np.concatenate([right, -right]), np.repeat([1, 0], len(right)))
        print(each.code, model.coef_[0].round(2).tolist())


def _features(signal: np.ndarray) -> list[np.ndarray]:
    complexes = find_complexes(*at_work_rate(signal.astype(np.float64), 100.0))
    beat = median_beat(complexes, BEFORE_S, AFTER_S)
    assert beat is not None
    beat = beat - np.median(beat, axis=1, keepdims=True)
    predicted = complete(beat[6:], STANDARD_LEADS[6:])[0]
    rows = [STANDARD_LEADS.index(each.lead) for each in EXCHANGES]
    return [lead_features(beat[row], predicted[row], complexes.fs_hz) for row in rows]


def print_neurokit2(signals: np.ndarray, table: pd.DataFrame) -> None:
    """neurokit2's verdicts on lead II and on made signals, and its intervals in normal ECGs and wide QRS."""
    import neurokit2

    def verdict(lead: np.ndarray, fs_hz: int) -> str:
        try:
            cleaned = neurokit2.ecg_clean(lead, sampling_rate=fs_hz)
            return str(neurokit2.ecg_quality(cleaned, sampling_rate=fs_hz, method="zhao2018"))
        except (ValueError, IndexError, ZeroDivisionError) as error:
            return type(error).__name__

    print("lead II:", Counter(verdict(signal[1], 100) for signal in signals[:200]))
    for number, kind in enumerate(MADE):
        drawn = [made_signals(kind, np.random.default_rng([SEED, number, seed])) for seed in range(50)]
        print(f"{kind}:", Counter(verdict(signal[0], int(fs_hz)) for signal, fs_hz in drawn))
    for method in ("dwt", "prominence"):
        for code in ("NORM", "CLBBB"):
            rows = np.flatnonzero(table.scp_codes.str.contains(f"'{code}'").to_numpy())[:30]
            spans = [_neurokit2_qrs_ms(neurokit2, signals[row, 1], method) for row in rows]
            print(f"{method}, {code}: median QRS {np.nanmedian(spans):.0f} ms")


def _neurokit2_qrs_ms(neurokit2: object, lead: np.ndarray, method: str) -> float:
    library: Any = neurokit2
    fine = library.ecg_clean(library.signal_resample(lead, sampling_rate=100, desired_sampling_rate=500), 500)
    peaks = library.ecg_peaks(fine, sampling_rate=500)[1]["ECG_R_Peaks"]
    waves = library.ecg_delineate(fine, peaks, sampling_rate=500, method=method)[1]
    spans = np.array(waves["ECG_R_Offsets"], float) - np.array(waves["ECG_R_Onsets"], float)
    return float(np.nanmedian(spans) * 2)


def main() -> None:
    """Print what the options ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--records", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=200, help="made signals of each kind")
    parser.add_argument("--fit", action="store_true")
    parser.add_argument("--neurokit2", action="store_true")
    options = parser.parse_args()
    signals, table = read_sample(options.data, range(1, 8) if options.fit else [8], options.records)
    if options.fit:
        fit(signals)
    elif options.neurokit2:
        print_neurokit2(signals, table)
    else:
        print_verdicts(signals, table)
        print_made(options.seeds)
        print_intervals(signals, table)


if __name__ == "__main__":
    main()
