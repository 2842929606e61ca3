import os
import subprocess
import sys

import torch
from safetensors import safe_open
from safetensors.torch import load

from diffusion_trainer import tensorfile

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
    "a": torch.tensor(2.5),
    "ä": torch.arange(3, dtype=torch.bfloat16),
    "n": torch.arange(4),
    "u": torch.arange(5, dtype=torch.uint8),
    "none": torch.empty(0, 4),
}
METADATA = {"z": "1", "a": "Grüße\n", "m": '{"x": 2}'}


def test_the_library_reads_what_is_written(tmp_path):
    (tmp_path / "t").write_bytes(tensorfile.encode(TENSORS, METADATA))
    read = load((tmp_path / "t").read_bytes())
    assert set(read) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    with safe_open(tmp_path / "t", framework="pt") as file:
        assert file.metadata() == METADATA


def test_data_is_aligned_for_memory_maps():
    content = tensorfile.encode(TENSORS, {})
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_order_of_insertion_does_not_matter():
    backwards = dict(reversed(TENSORS.items())), dict(reversed(METADATA.items()))
    assert tensorfile.encode(*backwards) == tensorfile.encode(TENSORS, METADATA)


def test_another_process_writes_the_same_bytes():
    """The library's own writer does not: it orders metadata by a hash with a random seed."""
    script = (
        "import sys, torch; from diffusion_trainer import tensorfile; "
        "sys.stdout.buffer.write(tensorfile.encode({'b': torch.ones(2), 'a': torch.zeros(3)}, "
        "{k: k for k in ('x', 'y', 'z', 'v', 'w')}))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "1"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
    here = tensorfile.encode({"a": torch.zeros(3), "b": torch.ones(2)}, {k: k for k in "vwxyz"})
    assert ran.stdout == here
