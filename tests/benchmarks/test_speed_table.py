"""The table of speeds: who is compared with whom."""

from benchmarks.speed_table import fastest_peer, table, without_numba


def _row(provider: str, milliseconds: str, case: str = "small") -> dict[str, str]:
    return {"benchmark": "sinkhorn", "case": case, "provider": provider, "median_ms": milliseconds}


def test_the_fastest_peer_is_none_of_ours():
    known = {"ecgot": 2.0, "ecgot_torch": 1.0, "torch": 8.0, "pot_log": 5.0}
    assert fastest_peer(known) == 2.5
    assert without_numba(known) == 0.125
    assert fastest_peer({"ecgot": 2.0}) is None
    assert without_numba({"ecgot_torch": 2.0}) is None


def test_refused_rows_are_dashes_and_losses_are_named():
    rows = [_row("ecgot", "2.0"), _row("torch", "1.0"), _row("pot_log", "")]
    rows += [_row("ecgot", "1.0", "large"), _row("torch", "30", "large"), _row("pot_log", "40.0", "large")]
    lines = table(rows, named=False).splitlines()
    assert lines[2] == "| small | 2.00 | 1.00 | - | 0.50 | - |"
    assert lines[3] == "| large | 1.00 | 30.0 | 40.0 | 30.0 | - |"
    assert lines[5] == "Fastest peer / ecgot: 0.50 at least, 15.2 in the median of 2."
    assert lines[6:] == ["- slower than the fastest peer: small (0.50)"]
