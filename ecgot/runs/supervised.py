"""The settings of a classifier's training, which its run's folder keeps in supervised.json."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path

from ecgot.choices import ALL, GROUPS, SUPERVISED_EPOCHS, SUPERVISED_GROUP
from ecgot.errors import EcgotError
from ecgot.files import write_text
from ecgot.runs.run import Run

STAGE = "supervised"


@dataclass(frozen=True)
class SupervisedConfig:
    """How a classifier is trained; the defaults are the PTB-XL benchmark's.

    Attributes:
        start: the run whose aligned encoder is fine-tuned, see :meth:`ecgot.runs.run.Run.named`; "" trains
            from scratch.
        group: the label group, or "all"; "" with ``labels_csv``.
        labels_csv: path of a CSV of yes/no labels in place of a group, see :mod:`ecgot.data.yes_no`.
        crop_seconds: length of the crops in training and scoring; 0 takes whole records.
        stride_seconds: distance between crops in scoring.
        learning_rate, encoder_learning_rate: peak rates of the head and of the encoder.
        average: decay of an exponential moving average of the weights; 0 keeps the last weights.
        classes: label group -> its classes, in the order of the logits; known once the labels are read.
    """

    start: str = ""
    group: str = SUPERVISED_GROUP
    labels_csv: str = ""
    epochs: int = SUPERVISED_EPOCHS
    batch_size: int = 128
    learning_rate: float = 1e-2
    encoder_learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    average: float = 0.0
    crop_seconds: float = 2.5
    stride_seconds: float = 1.25
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[str, ...]:
        """The label groups that the classifier learns."""
        if self.labels_csv:
            return ()
        return GROUPS if self.group == ALL else (self.group,)

    def crop_samples(self, fs_hz: float) -> tuple[int, int]:
        """Length of a crop and the distance between crops, in samples; a length of 0 is a whole record."""
        if not self.crop_seconds:
            return 0, 0
        return max(1, round(self.crop_seconds * fs_hz)), max(1, round(self.stride_seconds * fs_hz))

    def save(self, folder: Path) -> None:
        """Write supervised.json."""
        write_text(folder / "supervised.json", json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def of(cls, run: Run) -> "SupervisedConfig":
        """The settings in a run's supervised.json.

        Raises:
            EcgotError: there are none, or they are damaged.
        """
        path = run.folder / "supervised.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["classes"] = {group: tuple(names) for group, names in values["classes"].items()}
            return cls(**values)
        except FileNotFoundError as error:
            raise EcgotError(
                f"run: expected a folder of ecgot supervise, got {run.folder}, which has no {path.name}"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EcgotError(
                f"run: expected the settings of a supervised run in {path}, got something else ({error})"
            ) from error
