"""Items that go wrong in every way that one can, between some that do not."""

import os
import time

from benchmarks.first_contact.items import Item


def row(case):
    return {"case": case, "provider": "ecgot", "median_ms": 1.0}


def raises():
    yield row("before it raised")
    raise RuntimeError("out of something\nand a long story")


def dies():
    yield row("before it died")
    os.abort()


def hangs():
    yield row("before it hung")
    time.sleep(60)


def items(_sizes, out):
    slow = (out / "slow").exists()
    return [
        Item("raises", raises),
        Item("dies", dies),
        Item("hangs", hangs, seconds=0.5),
        Item("takes long", lambda: time.sleep(60 if slow else 0) or [row("takes long")]),
        Item("good", lambda: [row("good")]),
    ]
