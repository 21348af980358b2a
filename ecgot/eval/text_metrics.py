"""Report metrics: text metrics from well-known libraries and label F1, each with its definition ("dialect").

Between papers, numbers differ more by dialect than by model: tokenisation, case, smoothing and averaging all
change them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from ecgot.choices import RESAMPLES
from ecgot.eval.auroc import patient_weights
from ecgot.text.labels import label_groups, stated_labels

_BLEU = BLEU(lowercase=True)
_BLEU.corpus_score(["a"], [["a"]])  # its signature holds the number of references only after a first use
# The same counts, without a warning if a report is too short for long n-grams.
_ONE_REPORT = BLEU(lowercase=True, effective_order=True)
_ORDER = 4  # BLEU's longest n-grams
_ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
DIALECT = {
    "bleu": f"corpus BLEU by sacrebleu ({_BLEU.get_signature()}); BLEU-n stops at "
    "n-grams of that length; 0 to 1",
    "meteor": f"mean over reports, nltk {version('nltk')}, words split at white space, lower case, exact and "
    "Porter-stem matches without WordNet synonyms; 0 to 1",
    "rouge": f"mean F1 over reports, rouge-score {version('rouge-score')} with Porter stemming; 0 to 1",
    "label_f1": "macro F1 of the classes that a report states by ecgot/text/labels.toml, against "
    "those that its reference states; 0 to 1",
}


@dataclass(frozen=True)
class ReportStatistics:
    """Per-report statistics, from which the metrics follow for any weighting of the n reports.

    Attributes:
        bleu: [n, 2 + 2 * 4]: lengths of report and reference, then matched and all n-grams of each order.
        means: by name, [n]: metrics that are means over reports.
        labels: by label group, the classes stated by reports and by references, both [n, C].
    """

    bleu: np.ndarray
    means: dict[str, np.ndarray]
    labels: dict[str, tuple[np.ndarray, np.ndarray]]

    def metrics(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """The metrics, with each report counted ``weights`` [n] times: whole numbers, 1 if omitted."""
        weights = np.ones(len(self.bleu)) if weights is None else weights
        written, wanted, *counts = (weights @ self.bleu).astype(int).tolist()
        metrics = {}
        for order in range(1, _ORDER + 1):
            bleu = BLEU.compute_bleu(
                counts[:order],
                counts[_ORDER : _ORDER + order],
                written,
                wanted,
                smooth_method="exp",
                max_ngram_order=order,
            )
            metrics[f"bleu_{order}"] = bleu.score / 100
        for name, values in self.means.items():
            metrics[name] = float(weights @ values / weights.sum())
        for group, (stated, wanted_labels) in self.labels.items():
            metrics[f"label_f1_{group}"] = label_f1(stated, wanted_labels, weights)
        return metrics

    def intervals(
        self, patients: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """95 % bootstrap interval of each metric over patients [n] (percentiles)."""
        drawn = [self.metrics(weights) for weights in patient_weights(patients, resamples, seed)]
        intervals = {}
        for name in drawn[0]:
            values = np.array([each[name] for each in drawn])
            known = values[~np.isnan(values)]
            low, high = np.percentile(known, [2.5, 97.5]) if len(known) else (np.nan, np.nan)
            intervals[name] = (float(low), float(high))
        return intervals


def report_statistics(hypotheses: Sequence[str], references: Sequence[str]) -> ReportStatistics:
    """Statistics of n generated reports against their n references."""
    if not references:
        raise ValueError("references: expected at least 1, got none")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"hypotheses: expected {len(references)}, one for each reference, got {len(hypotheses)}"
        )
    hypotheses = [text.lower() for text in hypotheses]
    references = [text.lower() for text in references]
    pairs = list(zip(hypotheses, references, strict=True))
    return ReportStatistics(
        np.array([_bleu_counts(*pair) for pair in pairs], dtype=np.float64),
        _means(pairs),
        {
            group: (stated_labels(hypotheses, group), stated_labels(references, group))
            for group in label_groups()
        },
    )


def report_metrics(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU-1..4, METEOR, ROUGE-1/2/L and label F1 of n reports against their n references, in [0, 1]."""
    return report_statistics(hypotheses, references).metrics()


def label_f1(stated: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> float:
    """Macro F1 of labels [n, C] with record weights [n]; classes that neither side has are left out."""
    both, either = weights @ (stated & wanted), weights @ stated + weights @ wanted
    some = either > 0
    return float(np.mean(2 * both[some] / either[some])) if some.any() else float("nan")


def _bleu_counts(hypothesis: str, reference: str) -> list[int]:
    score = _ONE_REPORT.sentence_score(hypothesis, [reference])
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def _means(pairs: Sequence[tuple[str, str]]) -> dict[str, np.ndarray]:
    stemmer, synonyms = PorterStemmer(), _NoSynonyms()
    means = {
        "meteor": [
            single_meteor_score(reference.split(), text.split(), stemmer=stemmer, wordnet=synonyms)
            for text, reference in pairs
        ]
    }
    scorer = RougeScorer(tuple(_ROUGE.values()), use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in pairs]
    for name, key in _ROUGE.items():
        means[name] = [score[key].fmeasure for score in scores]
    return {name: np.array(values) for name, values in means.items()}


class _NoSynonyms:
    """Stands in for nltk's WordNet, which would have to be downloaded."""

    def synsets(self, _word: str) -> list[object]:
        return []
