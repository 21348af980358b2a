"""What readings of a held-out fold are worth: probabilities, contradictions, evidence, verdicts.

python -m benchmarks.reading PTBXL [RUN] --folds 9 [--calibration FILE] [--records 500] [--out FILE.json]

Prints a Markdown table for each. The fold must be one on which neither the run was trained nor its
calibration learned.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.output import stamp
from ecgot.data.ptbxl import PtbXlTable, read_table
from ecgot.eval.calibration import calibration_report
from ecgot.eval.grounding import grounding
from ecgot.eval.text_metrics import report_metrics
from ecgot.inference.calibration import FILE, Calibration, class_name
from ecgot.inference.reader import EcgReader
from ecgot.inference.reading import Reading
from ecgot.inference.verify import contradictions
from ecgot.runs.config import parse_folds
from ecgot.runs.run import PRETRAINED, Run
from ecgot.text.cleaning import clean_report
from ecgot.text.glossary import plain_english
from ecgot.text.statements import sentences

METRICS = ("bleu_4", "meteor", "rouge_l", "label_f1_superclass", "label_f1_rhythm")
SHOWN = (("superclass", "superclasses"), ("all", "all classes with 10 positives"))


def probabilities(report: dict[str, Any]) -> list[str]:
    """Lines of the table of calibration errors, and of the thresholds of every class."""
    lines = [
        "| classes | calibration error | before | by chance | sensitivity | specificity | covered: present | "
        "absent | undecided |",
        "|" + " --- |" * 9,
    ]
    keys = [*("ece", "ece_before", "ece_floor", "sensitivity", "specificity")]
    keys += [*("coverage_present", "coverage_absent", "undecided")]
    for group, name in SHOWN:
        values = report["summary"][group]
        lines.append(f"| {name} | " + " | ".join(f"{values[key]:.3f}" for key in keys) + " |")
    lines += ["", "| class | positives | AUROC | threshold | sensitivity | specificity |", "|" + " --- |" * 6]
    for group, classes in report["classes"].items():
        for code, each in classes.items():
            numbers = (each.get(key) for key in ("auroc", "threshold", "sensitivity", "specificity"))
            shown = " | ".join("-" if number is None else f"{number:.2f}" for number in numbers)
            lines.append(f"| {class_name(group, code)} ({code}) | {each['positives']} | {shown} |")
    return lines


def reports(readings: list[Reading], table: PtbXlTable) -> dict[str, Any]:
    """Contradictions of reports as they were written and as they are said, and metrics of both."""
    references = [plain_english(clean_report(text)) for text in table.reports]
    found: dict[str, Any] = {}
    for name in ("written", "said", "references"):
        count, kinds, texts = 0, Counter[str](), []
        for reading, reference in zip(readings, references, strict=True):
            text = {"written": reading.written, "said": reading.report, "references": reference}[name] or ""
            texts.append(text)
            by_group: dict[str, dict[str, float]] = {}
            for each in reading.findings if name != "references" else ():
                by_group.setdefault(each.group, {})[each.code] = each.probability
            wrong = contradictions(sentences(text), reading.measurements, by_group)
            count += len(wrong)
            kinds.update(each.reason.split(";")[0].split(' beside "')[0] for each in wrong)
        with_reference = [row for row, text in enumerate(references) if text]
        metrics = report_metrics(
            [texts[row] for row in with_reference], [references[row] for row in with_reference]
        )
        found[name] = {"contradictions": count, "kinds": dict(kinds.most_common(8))}
        found[name] |= {"metrics": {} if name == "references" else {key: metrics[key] for key in METRICS}}
    return found


def slow_hearts(readings: list[Reading]) -> dict[str, int]:
    """Of the records under 60/min, how many reports call them bradycardia, as written and as said."""
    slow = [each for each in readings if each.measurements and (each.measurements.heart_rate_bpm or 99) < 60]
    return {
        "under 60/min": len(slow),
        "written": sum("bradycardia" in (each.written or "") for each in slow),
        "said": sum("bradycardia" in (each.report or "") for each in slow),
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("run", type=Path, nargs="?", default=PRETRAINED)
    parser.add_argument("--folds", default="9")
    parser.add_argument("--calibration", type=Path, help="default: the run's own")
    parser.add_argument("--records", type=int, default=500, help="that are read with reports, spread evenly")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    run, folds = Run.open(options.run), parse_folds(options.folds)
    own = json.loads((options.calibration or run.folder / FILE).read_text(encoding="utf-8"))
    calibration = Calibration.load(options.calibration or run.folder / FILE, own["fingerprint"])
    result: dict[str, Any] = {"origin": stamp(), "run": run.folder.name, "folds": folds}
    result["probabilities"] = calibration_report(run, calibration, options.data, folds)
    print("\n".join(probabilities(result["probabilities"])), flush=True)
    result["grounding"] = grounding(run, options.data, folds=folds)
    print("\n" + json.dumps(result["grounding"]["evidence"]), flush=True)
    if run.done("report"):
        result |= _read(EcgReader(run), options.data, folds, options.records)
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _read(reader: EcgReader, root: Path, folds: tuple[int, ...], count: int) -> dict[str, Any]:
    table = read_table(root, folds=folds)
    table = table.select(np.unique(np.linspace(0, len(table) - 1, count).astype(np.int64)))
    found = reader([root / path for path in table.record_paths])
    rows = [row for row, each in enumerate(found) if isinstance(each, Reading) and not each.refused]
    verdicts = Counter(each.quality.verdict if isinstance(each, Reading) else "unreadable" for each in found)
    readings = [found[row] for row in rows]
    said = reports(readings, table.select(np.array(rows)))
    print("\n| reports | contradictions | " + " | ".join(METRICS) + " |", "|" + " --- |" * 7, sep="\n")
    for name, values in said.items():
        metrics = " | ".join(f"{values['metrics'].get(key, float('nan')):.3f}" for key in METRICS)
        print(f"| {name} | {values['contradictions']} of {len(readings)} | {metrics} |")
    slow = slow_hearts(readings)
    print(f"\nverdicts: {dict(verdicts)}; slow hearts: {slow}", flush=True)
    return {"reports": said, "verdicts": dict(verdicts), "slow_hearts": slow, "records": len(readings)}


if __name__ == "__main__":
    main()
