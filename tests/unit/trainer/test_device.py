"""What a run chooses of CUDA's algorithms. Torch keeps these choices without a GPU, too."""

from types import SimpleNamespace

import pytest
import torch
from torch import backends

from diffusion_api.memory_reference import spec_of
from diffusion_trainer.device import open_device


@pytest.fixture(autouse=True)
def _choices_put_back():
    tf32 = backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    yield
    torch.use_deterministic_algorithms(mode=False)
    backends.cudnn.deterministic = backends.cudnn.benchmark = False
    backends.cuda.enable_mem_efficient_sdp(enabled=True)
    backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = tf32


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_runs_round_nothing_to_tf32(deterministic):
    open_device(SimpleNamespace(device="CPU", spec=spec_of("LoRA", 64, deterministic=deterministic)))
    assert torch.are_deterministic_algorithms_enabled() == backends.cudnn.deterministic == deterministic
    assert backends.cudnn.benchmark != deterministic
    assert backends.cuda.mem_efficient_sdp_enabled() != deterministic
    # Torch has an old and a new name for it, and raises here where one of them was set against the other.
    assert backends.cudnn.allow_tf32 != deterministic
    assert not backends.cuda.matmul.allow_tf32
    assert (backends.cudnn.conv.fp32_precision == "tf32") != deterministic
    assert backends.cuda.matmul.fp32_precision != "tf32"
