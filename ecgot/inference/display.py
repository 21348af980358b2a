"""What a person reads beside numbers, and how numbers are written."""

from collections.abc import Mapping
from typing import Any

NOTICE = "Research software, not a medical device: do not use it for diagnosis or treatment."
SURE = 0.5  # a sentence of a lower probability is marked


def metric_text(metric: Mapping[str, Any]) -> str:
    """ "value [low, high]" of a metric with these keys; "-" where it could not be had."""
    if metric["value"] is None:  # no class of the group is stated by either side
        return "-"
    if metric["low"] is None:
        return f"{metric['value']:.3f}"
    return f"{metric['value']:.3f} [{metric['low']:.3f}, {metric['high']:.3f}]"


def auroc_text(ranking: Mapping[str, Any] | None) -> str:
    """The same of a :class:`ecgot.eval.auroc.AurocResult` as plain values."""
    return "-" if ranking is None else metric_text({**ranking, "value": ranking["macro"]})
