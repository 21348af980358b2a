"""Check and measure everything on a GPU that the kernels are new to, in nine minutes; usage in ``__main__``.

``steps`` says what runs, in which order and for how long; ``runner`` runs it in processes that may fail;
``items`` measures within one, item by item; ``journal`` holds the files of OUT, to which each finding goes
the moment it is known; ``summary`` reads them back and gives a verdict, by the bounds in ``goals``.
What is measured: ``machine`` (versions, ceilings), ``small`` (dimensions that fill no tile), ``transport``,
``streaming``, ``networks``, ``counters`` (ncu, the sanitizers, the table of convolutions).
"""
