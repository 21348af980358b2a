"""The benchmark's cases for compute-sanitizer and ncu leave no kernel out."""

import pytest
import torch

from benchmarks import kernel_cases
from ecgot.kernels import dispatch
from ecgot.kernels.resources import cases


@pytest.mark.skipif(
    not (dispatch.INTERPRETED or torch.cuda.is_available()), reason="TRITON_INTERPRET=1 is not set and no GPU"
)
def test_every_kernel_is_launched_and_gives_numbers(monkeypatch, capsys):
    launched: set[str] = set()
    launch = dispatch.launch

    def noting(kernel, grid, *arguments, **named):
        launched.add(kernel.__name__)
        launch(kernel, grid, *arguments, **named)

    for module in cases.MODULES:
        monkeypatch.setattr(f"{module}.launch", noting)
    assert kernel_cases.main([]) == 0
    assert launched == {case.kernel for case in cases.cases("sm_90")}
    assert capsys.readouterr().out.count("all finite") == len(kernel_cases.CASES)


def test_an_unknown_case_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        kernel_cases.main(["softmax"])
    assert "CASE: expected one of sinkhorn, solver, streaming" in capsys.readouterr().err
