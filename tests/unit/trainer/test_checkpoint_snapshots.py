"""Every bit of a snapshot comes back, and what could not come back exactly is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusion_trainer.checkpoint import Ledger, Snapshot
from diffusion_trainer.checkpoint.staging import Staging, claimed
from diffusion_trainer.errors import StorageUnavailable
from testkit.objectstore import MemoryStore, Objects

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
DTYPES = [*FLOATS, *INTEGERS, torch.bool, torch.complex64]
SHAPES = [(), (1,), (7,), (3, 5), (0,), (2, 0, 3), (1, 2, 3, 4)]


def bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def some(dtype: torch.dtype, shape: tuple[int, ...], *, seed: int = 0) -> torch.Tensor:
    """Return a tensor of any bits at all, NaNs with payloads and denormals among them."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return (raw % 2).bool().reshape(shape) if dtype == torch.bool else raw.view(dtype).reshape(shape)


def round_trip(snapshot: Snapshot) -> Snapshot:
    ledger = Ledger(MemoryStore(objects := Objects()), attempt=1, run_spec_sha="")
    ledger.acquire()
    ledger.publish(snapshot)
    found = Ledger(MemoryStore(objects), attempt=2, run_spec_sha="").load()
    assert found is not None
    return found


def assert_same(found: Snapshot, wanted: Snapshot) -> None:
    assert (found.step, found.scalars) == (wanted.step, wanted.scalars)
    assert {g: set(t) for g, t in found.tensors.items()} == {g: set(t) for g, t in wanted.tensors.items()}
    for group, tensors in wanted.tensors.items():
        for name, tensor in tensors.items():
            back = found.tensors[group][name]
            assert (back.dtype, back.shape, bits(back)) == (tensor.dtype, tensor.shape, bits(tensor)), name
            assert back.is_contiguous()


def test_every_dtype_and_shape_comes_back_bit_for_bit() -> None:
    tensors = {
        f"{dtype}{list(shape)}": some(dtype, shape, seed=i) for i, dtype in enumerate(DTYPES) for shape in SHAPES
    }
    assert_same(round_trip(Snapshot(3, {"all": tensors}, {})), Snapshot(3, {"all": tensors}, {}))


def file_mapped_at(address: int) -> str:
    for line in Path("/proc/self/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        start, end = (int(number, 16) for number in fields[0].split("-"))
        if start <= address < end:
            return fields[5].strip() if len(fields) == 6 and fields[5].startswith("/") else ""
    raise AssertionError(f"nothing is mapped at {address:#x}")


def test_what_is_read_lies_on_disk_and_can_be_written_to() -> None:
    """A snapshot of many gigabytes is not copied into memory: its tensors are parts of a mapping of its file."""
    wanted = {"a": torch.arange(6.0), "b": torch.ones(3, 4)}
    found = round_trip(Snapshot(1, {"model": wanted}, {})).tensors["model"]
    assert all(file_mapped_at(tensor.data_ptr()).endswith("model.safetensors (deleted)") for tensor in found.values())
    assert file_mapped_at(wanted["a"].data_ptr()) == ""  # negative control
    found["a"].add_(1)
    assert torch.equal(found["a"], wanted["a"] + 1)
    assert torch.equal(found["b"], wanted["b"])


def test_groups_names_and_scalars_come_back() -> None:
    scalars = {
        "step": 2**60,
        "float": 0.1 + 0.2,
        "tiny": 5e-324,
        "list": [1, [2.5, None], {"a": True}],
        "text": "ünï \n \x00",
    }
    tensors = {"model": {"a.b/c": torch.ones(2), "": torch.zeros(1)}, "ema": {}, "optimizer": {"é": torch.arange(3)}}
    wanted = Snapshot(0, tensors, scalars)
    assert_same(round_trip(wanted), wanted)


def test_views_transposed_and_shared_tensors_come_back_with_memory_of_their_own() -> None:
    base = some(torch.float32, (4, 6))
    wanted = Snapshot(
        1, {"model": {"t": base.t(), "slice": base[::2, 1:3], "tied": base, "expanded": base[0, 0].expand(3)}}, {}
    )
    found = round_trip(wanted)
    assert_same(found, wanted)
    pointers = {tensor.untyped_storage().data_ptr() for tensor in found.tensors["model"].values()}
    assert len(pointers) == 4
    found.tensors["model"]["tied"].zero_()
    assert bits(found.tensors["model"]["t"]) == bits(base.t())


def test_parameters_that_require_gradients_are_held() -> None:
    wanted = Snapshot(1, {"model": {"weight": torch.nn.Parameter(some(torch.float32, (3,)))}}, {})
    assert not round_trip(wanted).tensors["model"]["weight"].requires_grad


@pytest.mark.parametrize(
    ("scalars", "where"),
    [
        ({"betas": (0.9, 0.999)}, r"scalars\['betas'\] is tuple"),
        ({"by_step": {1: 2}}, "JSON keys are strings"),
        ({"x": [torch.ones(1)]}, r"scalars\['x'\]\[0\] is Tensor"),
    ],
)
def test_scalars_that_json_would_change_are_refused(tmp_path: Path, scalars: dict, where: str) -> None:
    with pytest.raises(TypeError, match=where):
        Staging(tmp_path).stage(Snapshot(1, {}, scalars))


def test_tensors_that_cannot_be_held_are_refused(tmp_path: Path) -> None:
    for tensor in (torch.eye(2).to_sparse(), torch.ones(1, device="meta"), torch.ones(1, dtype=torch.complex128)):
        with pytest.raises(TypeError, match="tensor 'x' of group 'model'"):
            Staging(tmp_path).stage(Snapshot(1, {"model": {"x": tensor}}, {}))
    with pytest.raises(TypeError, match="reserves"):
        Staging(tmp_path).stage(Snapshot(1, {"model": {"__metadata__": torch.ones(1)}}, {}))


@pytest.mark.parametrize("group", ["", "../x", "a/b", "A", "state"])
def test_groups_that_are_no_file_names_are_refused(group: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file"):
        Snapshot(1, {group: {}}, {})


def test_staged_tensors_do_not_change_with_the_trainers(tmp_path: Path) -> None:
    weights = torch.ones(5)
    scalars = {"history": [1]}
    with claimed(tmp_path) as folder:
        Staging(folder).stage(Snapshot(1, {"model": {"w": weights}}, scalars))
        weights.zero_()
        scalars["history"].append(2)
        assert load_file(folder / "model.safetensors")["w"].tolist() == [1.0] * 5
        assert (folder / "state.json").read_text() == '{"history": [1]}'


def test_the_same_tensors_are_staged_into_the_same_pages(tmp_path: Path) -> None:
    staging = Staging(tmp_path)

    def inode(value: float, size: int = 3) -> int:
        staging.stage(Snapshot(1, {"model": {"w": torch.full((size,), value)}}, {}))
        assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [value] * size
        return (tmp_path / "model.safetensors").stat().st_ino

    first = inode(1.0)
    assert inode(2.0) == first
    assert load_file(tmp_path / "model.safetensors")["w"].tolist() == [2.0] * 3
    inode(3.0, size=4)
    staging.stage(Snapshot(2, {"ema": {}}, {}))
    assert {path.name for path in tmp_path.iterdir()} == {"ema.safetensors", "state.json"}


def test_a_full_staging_volume_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageUnavailable, match="room for one checkpoint"):
        Staging(tmp_path).stage(Snapshot(1, {"model": {"w": torch.ones(1)}}, {}))
    assert list(tmp_path.iterdir()) == []


def test_folders_of_dead_owners_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    (tmp_path / "snapshot-dead").mkdir()
    (tmp_path / "snapshot-dead" / "model.safetensors").write_bytes(b"gigabytes")
    with claimed(tmp_path) as first:
        with claimed(tmp_path) as second:
            assert {path.name for path in tmp_path.glob("snapshot-*")} == {first.name, second.name}
        assert first.is_dir()
    assert list(tmp_path.glob("snapshot-*")) == []
