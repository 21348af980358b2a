"""The transport solver against its peers at equal work: what ``ecgot bench`` and ``pytest benchmarks/`` run.

Equal work means equal marginal error (L1, the larger of the two sides, in the worst problem of the batch),
not equal iterations. ecgot runs to the tolerance and pays for its own stopping test. A peer is told in
advance, at no cost, the smallest number of iterations that brings it to the same tolerance. Values and
gradients are then checked against ``ecgot.kernels.ot.reference``, solved in fp64 far beyond the tolerance; a
provider with a wrong result is not timed. Each provider runs in a process of its own, and they take turns, so
that a busy machine slows all of them alike.

``cases`` holds the problems, ``providers`` the solvers, ``measure`` the check, ``apart`` the comparison,
``stopwatch`` the clock of every benchmark, and ``origin`` the stamp that says what was measured where.
"""
