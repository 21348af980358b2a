"""How results are written for people, and the notice beside them. Light: it imports no torch."""

from collections.abc import Mapping
from typing import Any

NOTICE = "Research software, not a medical device: do not use it for diagnosis or treatment."
SURE = 0.5  # a sentence whose probability is lower is marked as unsure


def metric_text(metric: Mapping[str, Any], *, interval: bool = True) -> str:
    """ "0.812", or "0.812 [0.790, 0.834]" with the interval; "-" if the metric is undefined.

    Args:
        metric: "value", "low" and "high"; None is undefined.
    """
    if metric["value"] is None:  # such as label F1 where neither side states a class of the group
        return "-"
    if metric["low"] is None or not interval:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def auroc_text(result: Mapping[str, Any] | None, *, interval: bool = True) -> str:
    """The same of an :class:`ecgot.eval.auroc.AurocResult` as a dict; "-" for None."""
    return "-" if result is None else metric_text({**result, "value": result["macro"]}, interval=interval)
