"""Report metrics, each by a well-known library, with its dialect said beside it.

Numbers of different papers differ more by dialect than by model: tokenisation, case, smoothing and what is
averaged all move them.
"""

from collections.abc import Sequence
from importlib.metadata import version

import numpy as np
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

_BLEU = BLEU(lowercase=True)
_BLEU.corpus_score(["a"], [["a"]])  # only then does it know that it takes one reference for each report
DIALECT = {
    "bleu": f"corpus BLEU by sacrebleu ({_BLEU.get_signature()}); BLEU-n stops at "
    "n-grams of that length; 0 to 1",
    "meteor": f"mean over reports, nltk {version('nltk')}, words split at white space, lower case, exact and "
    "Porter-stem matches without WordNet synonyms; 0 to 1",
    "rouge": f"mean F1 over reports, rouge-score {version('rouge-score')} with Porter stemming; 0 to 1",
    "references": "cleaned by ecgot.data.reports.clean_report and lower-cased",
}


class _NoSynonyms:
    """Stands in for nltk's WordNet, which would have to be downloaded."""

    def synsets(self, _word: str) -> list[object]:
        return []


def report_metrics(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """BLEU-1..4, METEOR and ROUGE-1/2/L of n generated reports against their n references, in [0, 1]."""
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"hypotheses: got {len(hypotheses)} for {len(references)} references")
    hypotheses = [text.lower() for text in hypotheses]
    references = [text.lower() for text in references]
    metrics = {}
    for order in (1, 2, 3, 4):
        bleu = BLEU(lowercase=True, max_ngram_order=order)
        metrics[f"bleu_{order}"] = bleu.corpus_score(hypotheses, [references]).score / 100
    stemmer, synonyms = PorterStemmer(), _NoSynonyms()
    metrics["meteor"] = float(
        np.mean(
            [
                single_meteor_score(reference.split(), hypothesis.split(), stemmer=stemmer, wordnet=synonyms)
                for hypothesis, reference in zip(hypotheses, references, strict=True)
            ]
        )
    )
    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(reference, text) for text, reference in zip(hypotheses, references, strict=True)]
    for name in names:
        key = name.replace("rouge", "rouge_").lower()
        metrics[key] = float(np.mean([score[name].fmeasure for score in scores]))
    return metrics
