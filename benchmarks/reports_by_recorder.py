"""Report metrics of the records that name their recorder and of those that do not, as a Markdown table.

python -m benchmarks.reports_by_recorder PTBXL RUN [RUN ...]    # runs that ecgot evaluate has read
"""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from ecgot.data.ptbxl import read_table
from ecgot.eval.text_metrics import report_metrics

SHOWN = ("bleu_4", "meteor", "rouge_l", "label_f1_superclass")


def table(root: Path, runs: Sequence[Path]) -> str:
    """Lines of the table; ``runs`` are folders with a generated_reports.csv."""
    records = read_table(root)
    recorder = dict(zip(records.ecg_id.tolist(), records.recorders, strict=True))
    lines = ["| reports | recorder | records | " + " | ".join(SHOWN) + " |", "| --- |" + " --- |" * 6]
    for run in runs:
        with (run / "generated_reports.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        for name, known in (("named", True), ("unknown", False)):
            part = [row for row in rows if bool(recorder[int(row["ecg_id"])]) == known]
            if part:
                metrics = report_metrics(
                    [row["generated"] for row in part], [row["reference"] for row in part]
                )
                values = " | ".join(f"{metrics[metric]:.3f}" for metric in SHOWN)
                lines.append(f"| {run.name} | {name} | {len(part)} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    print(table(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]]))
