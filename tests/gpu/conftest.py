"""The device of these tests: CUDA for `make gpu`; the CPU in the nightly tests, so that they are known to work."""

import pytest
import torch


@pytest.fixture(params=[pytest.param("CUDA", marks=pytest.mark.gpu), pytest.param("CPU", marks=pytest.mark.nightly)])
def device(request):
    """Return a device as RunConfig names it."""
    if request.param == "CUDA" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device on this machine")
    return request.param


@pytest.fixture
def cuda():
    """Return torch's name of the GPU, for what has no meaning without one."""
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device on this machine")
    return torch.device("cuda")
