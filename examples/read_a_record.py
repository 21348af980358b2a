"""Read an ECG with the model that comes with the package: scores, a report, and the encoder's tokens.

python examples/read_a_record.py            # a synthetic record
python examples/read_a_record.py RECORD     # a WFDB record of your own
"""

import sys
import tempfile
from pathlib import Path

import torch

import ecgot
from ecgot.data.synth import write_dataset
from ecgot.inference.display import NOTICE


def synthetic_record(folder: Path) -> Path:
    """Path of the first record of a small data set in PTB-XL's layout."""
    write_dataset(folder / "data", records=1, seed=0)
    return folder / "data/records100/00000/00001_lr"


def show(path: Path) -> None:
    """Read the record at ``path`` and print what the model makes of it."""
    reader = ecgot.EcgReader.from_pretrained()  # loads once, reads any number of records
    reading = reader(path)
    print(f"{path.name}: {reading.report}")
    for sentence in reading.sentences:
        print(f"  {sentence.text}", "" if sentence.probability is None else f"({sentence.probability:.0%})")
    for finding in reading.window.stated:
        where = reading.evidence(finding)
        print(f"found: {finding}, most plainly at {where.peak_s:.1f} s")
    for note in reading.notes:
        print("note:", note)

    # The same findings in the words of one of the recorders that the model knows.
    recorder = reader.recorders[0]
    print(f"as a {recorder} would say: {reader(path, recorder=recorder).report}")

    # The encoder alone, to build on: waveform [B, 12, T] in mV to tokens [B, N, D] and a pooled embedding.
    record = ecgot.read_record(path, fs_hz=100.0)
    with torch.no_grad():
        encoded = reader.scorer.model.encoder(torch.from_numpy(record.signal_mv)[None])
    print("tokens", tuple(encoded.tokens.shape), "pooled", tuple(encoded.pooled.shape))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        show(Path(sys.argv[1]) if len(sys.argv) > 1 else synthetic_record(Path(temporary)))
    print(NOTICE)


if __name__ == "__main__":
    main()
