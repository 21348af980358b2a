"""Draw an ECG as on paper, with what the packaged model makes of it.

    python examples/draw_reading.py OUT.png                   # record 25 of `make demo`'s synthetic data
    python examples/draw_reading.py OUT.png --record RECORD   # a record of your own

Twelve leads of 2.5 s each in three rows of four, lead II once more over the whole 10 s, at 25 mm/s and
10 mm/mV. Needs matplotlib (``pip install 'ecgot[plot]'``). The picture in the README is the first command's.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from ecgot.data.ptbxl import read_table
from ecgot.data.synth import write_dataset
from ecgot.inference.reader import EcgReader

DEMO_RECORD = 25  # atrial fibrillation with ischemic ST depression


def demo_record(folder: Path) -> tuple[Path, str]:
    """Write the first records of `make demo`'s data set below ``folder``.

    Returns:
        The path of ``DEMO_RECORD`` and a title with the findings that it was made with.
    """
    data = folder / "data"
    write_dataset(data, records=DEMO_RECORD, seed=0)
    row = read_table(data).select([DEMO_RECORD - 1])
    return data / row.record_paths[0], f"Simulated: {row.reports[0].rstrip('.')}"


def save(figure: Figure, out: Path) -> None:
    """As a PNG of 64 colours, which is a third of the size and looks the same."""
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole.png"
        figure.savefig(whole)
        with Image.open(whole) as image:
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", type=Path, help="a record in any format that ecgot reads")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path, title = options.record, str(options.record)
        if path is None:
            path, title = demo_record(Path(temporary))
        reading = EcgReader.from_pretrained()(path)
    save(dataclasses.replace(reading, record=title).plot(), options.out)


if __name__ == "__main__":
    main()
