"""Cleaning report text: removes annotations and boilerplate that no ECG shows."""

import re

# The diagnostic codes that an annotator appended ("Edit: NORM 80, (NORM 100)"): labels, not report text. No
# label may reach the training, so this is removed first.
_ANNOTATION = re.compile(r"\bedit\s*:.*$", re.DOTALL)
# The recorder's software version and its stamp, sometimes cut or freely translated: "4.46   unbestätigter
# bericht", "4.46 not confirmed", "4.46 un".
_STAMP = re.compile(
    r"(?:\b\d\.\d\d\s+)?\b(?:unbest\w*\.?\s+bericht|unconfirmed\s+report|obekräftad\s+rapport)\b\.?"
    r"|\b4\.[34]\d\b(?:\s+[a-zäöå.]+){0,2}\s*$"
)
_NO_READING = re.compile(r"\btrace only(?: requested)?\b\.?")
_PUNCTUATION_ALONE = re.compile(r"^[\W_]*$")


def clean_report(text: str) -> str:
    """Report text for training and reference: lower case, single spaces, no boilerplate; "" if none is left.

    This removes the annotators' "Edit: ..." tails (they hold diagnostic codes), the recorder's version and
    "unconfirmed report" stamp in German, English and Swedish, and "trace only requested", which means that
    nobody read the ECG. Everything else stays as written. Records whose text becomes empty are left out of
    text training and report metrics, but stay in every evaluation on labels.
    """
    text = " ".join(text.lower().split())
    for pattern in (_ANNOTATION, _STAMP, _NO_READING):
        text = " ".join(pattern.sub(" ", text).split())
    return "" if _PUNCTUATION_ALONE.match(text) else text
