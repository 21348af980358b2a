"""Batched entropic optimal transport between point clouds, or with given costs.

    OT_eps(a, b) = min_P <P, C> + eps KL(P | a (x) b)     over plans P with marginals a and b
    P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps),          value = <a, f> + <b, g> at the optimum

With ``rho`` a marginal may differ from its weights at the price rho KL(marginal | weights), where
KL(p | q) = sum p log(p / q) - p + q.
"""

from torch import Tensor

from ecgot.kernels.ot import checks, operators
from ecgot.kernels.ot.convergence import warn_if_unsolved
from ecgot.kernels.ot.outputs import SinkhornOutput, tensor_versions
from ecgot.kernels.ot.problem import Problem, SolverSettings


def sinkhorn(
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    cost: str = "sqeuclidean",
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    rho: float | Tensor | None = None,
    rho_x: float | Tensor | None = None,
    rho_y: float | Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-4,
    scaling: float | None = None,
    init: Tensor | None = None,
    precision: str = "fp32",
) -> SinkhornOutput:
    """Entropic optimal transport between B pairs of weighted point clouds.

    Args:
        x: [B, N, D], floating point, any strides. fp16 and bf16 are solved in fp32, fp64 in fp64.
        y: [B, M, D], on the same device.
        eps: regularisation in units of the cost, 1e-30 to 1e30: a number, or a tensor [B], in which ``value``
            is differentiable once. (geomloss: eps = blur**2 on half the squared distance.)
        cost: ``"sqeuclidean"``, ||x - y||^2; ``"euclidean"``, ||x - y|| (no gradient where points coincide);
            ``"cosine"``, 1 - cos(x, y); or ``"dot"``, -<x, y>. A zero vector (in fp32 also one shorter than
            1e-18) is at cosine distance 1 from everything and gets no gradient.
        a, b: non-negative weights [B, N] and [B, M]; uniform with sum 1 if None. Where both marginals are
            kept, they must sum to 1 over the unmasked points of each problem (checked on the CPU only, as a
            check on a GPU would wait for it) and are divided by their sum to mend its rounding; otherwise any
            mass will do. A weight below the smallest normal number of its dtype counts as 0.
        x_mask, y_mask: boolean [B, N] and [B, M], True where a point exists. Masked points are never read,
            even if NaN.
        rho: unbalanced transport: the weight, in units of the cost, of KL(marginal | weights) on both sides;
            ``rho_x`` and ``rho_y`` set one side each (semi-unbalanced). A number, or a tensor [B] without
            gradient; None, and infinity, keep the marginal.
            (geomloss's ``reach`` is rho = reach**p on its own cost, which is half the squared distance for
            p = 2: rho = 2 * reach**2 here.)
        max_iter: most iterations at ``eps``, >= 1; one iteration updates f and g.
        tol: a problem stops once its marginal error is at most this, >= 0. On a CPU a problem that does not
            get there warns (``SinkhornWarning``); 0 asks for ``max_iter`` iterations, without a warning.
        scaling: anneal: start with eps as large as the costs and multiply it by this factor (> 0, at most
            0.999) after each iteration until it is ``eps``. Pays off where eps is small.
        init: the potential g [B, M] of an earlier solution to start from.
        precision: of products on a GPU, ``"fp32"`` (three products of 11-bit halves: TF32 on chip, fp16 when
            streaming; IEEE on chip on AMD) or ``"tf32"`` (one). fp16 and bf16 points are exact in TF32, so
            one product is used for them where they are not centred first (cosine, dot).

    Returns:
        SinkhornOutput. ``value`` is differentiable twice in x, y, a and b (by the envelope theorem: exact at
        convergence, with memory independent of the number of iterations). The gradient in a and b is the
        potential, which is determined up to a constant. A problem without points (or mass) on one side has
        value 0 (if unbalanced, rho times the mass of the other side) and no gradient. NaN or infinity in a
        problem makes its own value NaN, and no other; that problem is not converged.

    Raises:
        ValueError, TypeError: one line, "NAME: expected X, got Y".

    In fp32, values are exact to about 1e-6 of the greater of eps and the largest cost between points, after
    each cloud is moved to its own mean (both to one common point where unbalanced or Euclidean). Clouds may
    thus lie anywhere, but where the clusters of one cloud lie d apart, differences of 1e-7 d^2 in the squared
    distance are lost: choose eps above that, or fp64. Where unbalanced, a mass is off by a factor of
    exp(error / rho): use fp64 where 1e-7 of the largest cost is not far below rho. Derivatives are
    reverse-mode: ``torch.func.jvp`` raises, ``grad``, ``vjp`` and ``torch.vmap`` do not, but under
    ``torch.func`` there are first derivatives only.

    On CUDA, problems of up to 128 x 128 points (or 256 x 64, ...) with any D are solved by one Triton program
    each, and larger ones by a streaming kernel in O((N + M) D) memory; fp64 uses torch. On a CPU, compiled
    loops solve (torch where numba cannot be imported), which beyond 2^24 costs per problem stream as well.
    With TRITON_INTERPRET=1 the Triton kernels run on the CPU too. Into a CUDA graph, where nothing
    can look for convergence, the torch and streaming solvers record at most 100 iterations (and 100 of
    annealing, with a lower ``scaling`` if need be); ``marginal_error`` and ``converged`` say how far it got.

    Sources: Cuturi 2013, "Sinkhorn Distances"; Chizat et al. 2018, "Scaling algorithms for unbalanced optimal
    transport problems"; Feydy et al. 2019, "Interpolating between Optimal Transport and MMD using Sinkhorn
    Divergences" (the gradient).

    >>> import torch
    >>> x = torch.tensor([[[0.0], [1.0], [2.0]]])
    >>> out = sinkhorn(x, x[:, [2, 0, 1]], eps=0.01)  # the same points in another order
    >>> out.plan()[0].mul(3).round().int().tolist()
    [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    >>> out.converged.tolist()
    [True]
    """
    x, y = checks.check_points(x, y)
    checks.check_cost(cost)
    checks.check_precision(precision)
    settings = checks.check_settings(max_iter, tol, scaling)
    eps = checks.check_eps(eps, x, x.shape[0])
    rhos = checks.check_rho(rho, rho_x, rho_y, eps.detach())
    free = rhos != (None, None)
    a = checks.check_weights("a", a, x, x_mask, any_mass=free)
    b = checks.check_weights("b", b, y, y_mask, any_mass=free)
    problem = Problem(x, y, a, b, None, None, eps, cost, *rhos, precision=precision)
    if init is not None:
        init = checks.check_potential(init, b.shape, x)
    return _solution(problem, init, settings)


def sinkhorn_from_cost(
    cost: Tensor,
    *,
    eps: float | Tensor,
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    rho: float | Tensor | None = None,
    rho_x: float | Tensor | None = None,
    rho_y: float | Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-4,
    scaling: float | None = None,
    init: Tensor | None = None,
) -> SinkhornOutput:
    """:func:`sinkhorn` with a given cost matrix [B, N, M], in which ``value`` is then differentiable.

    A cost [N, M] is shared by all problems and not copied for them; what has a row or an entry for each
    tells their number B, which is 1 without any. Infinity forbids a pair; NaN and minus infinity make the
    value of their problem NaN. The other arguments are those of :func:`sinkhorn`.

    >>> import torch
    >>> cost = torch.tensor([[[1.0, 5.0], [5.0, 2.0]]], requires_grad=True)
    >>> out = sinkhorn_from_cost(cost, eps=0.01)
    >>> f"{out.transport_cost().item():.2f}"  # 1 / 2 + 2 / 2
    '1.50'
    >>> out.value.backward()
    >>> cost.grad.round(decimals=3).tolist()  # the gradient in the cost is the plan
    [[[0.5, 0.0], [0.0, 0.5]]]
    """
    checks.check_tensor("cost", cost)
    if cost.dim() == 2:
        cost = cost.expand(checks.batch_of(eps, a, b, x_mask, y_mask, rho, rho_x, rho_y, init), *cost.shape)
    checks.check_floating("cost", cost, 3, "[B, N, M] or [N, M]")
    settings = checks.check_settings(max_iter, tol, scaling)
    eps = checks.check_eps(eps, cost, cost.shape[0])
    rhos = checks.check_rho(rho, rho_x, rho_y, eps.detach())
    free = rhos != (None, None)
    a = checks.check_weights("a", a, cost, x_mask, any_mass=free)
    b = checks.check_weights("b", b, cost.mT, y_mask, any_mass=free)
    if init is not None:
        init = checks.check_potential(init, b.shape, cost)
    problem = Problem(cost, None, a, b, None, None, eps, "given", *rhos)
    return _solution(problem, init, settings)


def _solution(problem: Problem, init: Tensor | None, settings: SolverSettings) -> SinkhornOutput:
    problem, found = operators.solve(problem, init, settings)
    warn_if_unsolved(problem, found, settings.tol)
    assert found.value is not None
    assert found.whole_f is not None
    assert found.whole_g is not None
    assert found.converged is not None
    return SinkhornOutput(
        value=found.value,
        f=found.whole_f,
        g=found.whole_g,
        marginal_error=found.error,
        iterations=found.iterations,
        converged=found.converged,
        _problem=problem,
        _raw=(found.f, found.g),
        _versions=tensor_versions(problem),
    )
