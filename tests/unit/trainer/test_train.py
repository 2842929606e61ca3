"""The engine's pure parts: cadence, curves, micro-batches, gradients, state, saving, results."""

import json
import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from diffusion_api.job import TrainerSpec
from diffusion_api.run import RunConfig
from diffusion_api.status import OutputFile
from diffusion_api.training import Ema, NonFinite, Training
from diffusion_api.validation import EarlyStopping, Validation
from diffusion_trainer import output
from diffusion_trainer.bookkeeping import LeadersBooks, Stepped
from diffusion_trainer.cadence import Cadence, auto_seconds, fits_grace
from diffusion_trainer.checkpoint import Snapshot
from diffusion_trainer.curves import Curves, Evaluation, Point
from diffusion_trainer.data import Batch
from diffusion_trainer.data.lock import DatasetLock, LockedImage
from diffusion_trainer.device import gpu_errors, micro_batch_size
from diffusion_trainer.errors import (
    BadConfig,
    BadData,
    CheckpointUnsupported,
    GpuFault,
    GpuOutOfMemory,
)
from diffusion_trainer.guard import Guard
from diffusion_trainer.methods import TextPath
from diffusion_trainer.metrics import Metrics
from diffusion_trainer.objective import DiscreteObjective
from diffusion_trainer.objectstore import open_store
from diffusion_trainer.optim import Group, apply_update
from diffusion_trainer.preparation import check_split, cut_off
from diffusion_trainer.progress import Board
from diffusion_trainer.state import Basis, made_trainable, restore, snapshot
from diffusion_trainer.stepping import Taken, gradients
from diffusion_trainer.train import open_batches

CPU = torch.device("cpu")


def _run(**changes):
    training = changes.pop("training", {})
    spec = {
        "method": "LoRA",
        "model": {"source": "file:///model/"},
        "dataset": {"source": "file:///data/"},
        "training": training,
        "output": {"destination": "file:///out/"},
    }
    job = {"name": "a", "namespace": "b", "uid": "c"}
    return RunConfig.model_validate({"job": job, "attempt": 1, "device": "CPU", "spec": spec, **changes})


# --- cadence ---


@pytest.mark.parametrize(
    ("interval", "cadence"),
    [
        ("Auto", Cadence()),
        ("500steps", Cadence(steps=500)),
        ("90s", Cadence(seconds=90)),
        ("10m", Cadence(seconds=600)),
        ("2h", Cadence(seconds=7200)),
    ],
)
def test_intervals(interval, cadence):
    assert Cadence.parse(interval) == cadence


def test_due_by_steps():
    due = [
        s for s in range(1, 10) if Cadence(steps=3).due(s, elapsed_seconds=0, stall_seconds=None, upload_seconds=None)
    ]
    assert due == [3, 6, 9]


def test_due_by_time():
    cadence = Cadence(seconds=90)
    assert not cadence.due(7, elapsed_seconds=89.9, stall_seconds=1, upload_seconds=1)
    assert cadence.due(7, elapsed_seconds=90, stall_seconds=1, upload_seconds=1)


@pytest.mark.parametrize(
    ("stall", "upload", "seconds"),
    [
        (None, None, 60),  # nothing measured yet: the shortest
        (1.0, 1.0, 120),  # sqrt(2 x 7200 x 1): the reference's table says 2.0 min
        (30.0, 10.0, math.sqrt(2 * 7200 * 30)),  # 11 min
        (0.01, 0.1, 60),  # clamped
        (1000.0, 10.0, 1800),  # clamped
        (1.0, 500.0, 600),  # an upload of 500 s needs 1.2 times that
        (1.0, 3000.0, 3600),  # also beyond the clamp, or uploads would never end
    ],
)
def test_auto_is_young_and_dalys_interval(stall, upload, seconds):
    assert auto_seconds(stall_seconds=stall, upload_seconds=upload) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("left", "upload", "size", "fits"),
    [
        (100, 60, 0, True),
        (100, 61, 0, False),
        (15, None, 400_000_000, True),  # 8 s at the assumed 50 MB/s
        (15, None, 500_000_000, False),
        (0, None, 1, False),
    ],
)
def test_a_last_save_must_fit_into_most_of_what_is_left(left, upload, size, fits):
    assert fits_grace(seconds_left=left, upload_seconds=upload, size_bytes=size) == fits


# --- micro-batches ---


@pytest.mark.parametrize(
    ("batch", "asked", "found", "size"),
    [
        (16, "Auto", None, 16),
        (16, "Auto", 8, 8),
        (16, 4, None, 4),
        (16, 4, 2, 2),
        (16, 4, 8, 4),
        (12, 5, None, 4),  # the largest divisor of 12 up to 5
        (7, 4, None, 1),
        (4, 64, None, 4),
    ],
)
def test_the_micro_batch_divides_the_batch_within_its_bounds(batch, asked, found, size):
    run = _run(training={"batchSize": batch, "microBatchSize": asked}, microBatchSize=found)
    assert micro_batch_size(run) == size


def test_a_batch_that_gpus_cannot_share_is_refused():
    assert micro_batch_size(_run(training={"batchSize": 8}, processesPerNode=4)) == 2
    for batch in (2, 6):
        with pytest.raises(BadConfig, match=r"training.batchSize is \d.*multiple of 4"):
            micro_batch_size(_run(training={"batchSize": batch}, processesPerNode=4))


def test_errors_of_cuda_get_their_names():
    with pytest.raises(GpuOutOfMemory, match=r"2\.00 GiB"), gpu_errors():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(GpuOutOfMemory, match="ALLOC_FAILED"), gpu_errors():
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    with pytest.raises(GpuFault, match="ECC"), gpu_errors():
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore")
    with pytest.raises(RuntimeError, match="shapes"), gpu_errors():
        raise RuntimeError("shapes do not match")


# --- the gradients of one step ---


@dataclass
class FakeReady:
    """A denoiser with one weight, which is all that `gradients` needs of a model."""

    weight: torch.nn.Parameter
    objective: DiscreteObjective
    batch_size: int

    def __post_init__(self):
        self.device = SimpleNamespace(torch=CPU)
        self.trained = SimpleNamespace(scale=None)
        self.extent = SimpleNamespace(batch_size=self.batch_size)

    def errors(self, batch):
        noisy = self.objective.noisy(batch.latents, batch.noise, times=batch.times)
        return self.objective.errors(noisy * self.weight, batch.latents, batch.noise, times=batch.times)


def _ready(size):
    alphas = torch.linspace(0.999, 0.005, 1000)
    objective = DiscreteObjective.of(alphas, prediction="Epsilon", gamma=5.0)
    return FakeReady(torch.nn.Parameter(torch.tensor(0.5)), objective, size)


def _batch(size):
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, size, 4, 2, 2, generator=generator)
    timesteps = torch.arange(size) * 37
    return Batch(latents, noise, timesteps, {}, torch.zeros(size, 6), torch.ones(size))


def _cut(batch, size):
    names = ("latents", "noise", "times", "geometry", "weights")
    pieces = zip(*(getattr(batch, name).split(size) for name in names), strict=True)
    return [replace(batch, **dict(zip(names, piece, strict=True))) for piece in pieces]


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 6, 12])
def test_the_gradient_does_not_depend_on_the_micro_batch(micro):
    whole, cut = _ready(12), _ready(12)
    shares = gradients([_batch(12)], whole)
    again = gradients(_cut(_batch(12), micro), cut)
    torch.testing.assert_close(again, shares)
    torch.testing.assert_close(cut.weight.grad, whole.weight.grad)


def test_the_loss_is_the_mean_over_the_images_of_the_batch():
    ready, batch = _ready(3), _batch(3)
    loss = gradients([batch], ready).sum()
    alphas = ready.objective.alphas[batch.times].double()
    total = 0.0
    for i in range(3):
        noisy = alphas[i].sqrt() * batch.latents[i] + (1 - alphas[i]).sqrt() * batch.noise[i]
        ratio = alphas[i] / (1 - alphas[i])
        total += min(ratio, 5.0) / ratio * (noisy * 0.5 - batch.noise[i]).square().mean()
    assert loss.item() == pytest.approx(float(total) / 3, rel=1e-5)
    assert not loss.requires_grad


def test_loader_workers_are_forked_before_anything_else_goes_on(monkeypatch):
    """Found by the exactness test: workers that were forked in the middle of an upload kept its lock for ever."""
    events = []

    def loader(*_, steps, **__):
        events.append("workers forked")
        try:
            yield from steps
        finally:
            events.append("workers ended")

    monkeypatch.setattr("diffusion_trainer.train.data.open_loader", loader)
    ready = SimpleNamespace(plan=None, cache=None, share=None, objective=None, extent=SimpleNamespace(total_steps=5))
    with open_batches(_run().spec, ready, start_step=2, workers=2) as batches:
        events.append("opened")
        assert list(batches) == [2, 3, 4]
    assert events[:2] == ["workers forked", "opened"]
    assert events[-1] == "workers ended"
    with open_batches(_run().spec, ready, start_step=5, workers=2) as batches:
        assert list(batches) == []


# --- curves ---


def _curves():
    curves = Curves()
    for step in (1, 2, 3):
        curves.note(step, loss=torch.tensor(step / 10), learning_rate=1e-4, grad_norm=torch.tensor(2.0))
    return curves


def test_losses_become_numbers_only_when_asked():
    curves = _curves()
    assert curves.points == []
    assert [point.step for point in curves.settle()] == [1, 2, 3]
    assert curves.settle() == []
    assert curves.points[1].loss == torch.tensor(0.2).item()


def test_curves_survive_a_checkpoint_exactly():
    curves = _curves()
    curves.settle()
    curves.evaluate(3, Evaluation(3, 5.0))
    curves.evaluate(3, Evaluation(3, 0.1 + 0.2, (0.1, 0.7), 0.3, 0.25, 1e-3))  # done again after a stop
    assert (len(curves.evaluations), curves.evaluated) == (1, 3)
    curves.evaluated = 3
    again = Curves.restored(curves.tensors(), json.loads(json.dumps(curves.scalars())))
    assert again == curves
    assert Curves.restored(Curves().tensors(), Curves().scalars()) == Curves()
    older = curves.scalars() | {"evaluations": [[3, 0.1, [0.1, 0.7], 0.3, 0.25]]}  # written before there was a chance
    assert Curves.restored(curves.tensors(), older).evaluations == [Evaluation(3, 0.1, (0.1, 0.7), 0.3, 0.25)]


def test_metrics_jsonl_is_one_line_per_step():
    curves = _curves()
    curves.settle()
    curves.evaluations.append(Evaluation(2, 0.5, (0.25, 0.75)))
    lines = [json.loads(line) for line in curves.to_jsonl().decode().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[1]["validation_loss"] == 0.5
    assert "validation_loss" not in lines[0]
    assert lines[0]["learning_rate"] == 1e-4


def test_what_is_not_finite_is_null_in_json():
    curves = Curves(points=[Point(1, math.nan, 0.1, math.inf)])
    assert json.loads(curves.to_jsonl()) == {"step": 1, "loss": None, "learning_rate": 0.1, "grad_norm": None}


@pytest.mark.parametrize(("step", "left"), [(0, [1, 2, 3]), (2, [3]), (3, [])])
def test_points_since_a_step(step, left):
    curves = _curves()
    curves.settle()
    assert [point.step for point in curves.since(step)] == left


@pytest.mark.parametrize(("loss", "norm", "skipped"), [(0.1, 2.0, False), (math.nan, 2.0, True), (0.1, math.inf, True)])
def test_a_step_without_numbers_counts_as_skipped(loss, norm, skipped):
    assert Point(1, loss, 0.1, norm).skipped == skipped


def test_lost_losses_are_counted_and_their_images_named():
    curves, metrics, board = _curves(), Metrics(), Board(attempt=1)
    images = [SimpleNamespace(key=f"{i}.png") for i in range(20)]
    slots = {3: [SimpleNamespace(image=7), SimpleNamespace(image=9)]}  # steps count from 0 in the plan
    plan = SimpleNamespace(lock=SimpleNamespace(images=images), batch=slots.__getitem__)
    saver = SimpleNamespace(due=lambda _: False, announce=lambda: None)
    reporter = SimpleNamespace(due=lambda _: True, report=lambda *_: None, stepped=lambda *_, **__: None)
    books = LeadersBooks(board, curves, plan, reporter, saver, None, metrics, None, Guard(NonFinite(), CPU))
    for step, shares, norm in ((4, [0.5, math.nan], 1.0), (5, [0.5, 0.5], math.inf)):
        each = torch.tensor(shares)
        books.note(Stepped(step, Taken(each.sum(), torch.tensor(norm), 2e-3, each), 0.0))
    books.close(5)
    assert board.state.warnings == (
        "step 4 changed nothing, for its loss was nan: look at the images whose loss was not finite in step 4: 9.png",
    )
    assert "diffusion_trainer_nonfinite_loss_total 1.0" in metrics.text().decode()
    assert "diffusion_trainer_skipped_steps_total 2.0" in metrics.text().decode()


def test_nothing_is_saved_while_steps_are_skipped():
    """Such a checkpoint would hold the weights that led there: going back to it would lead there again."""
    saves, guard = [], Guard(NonFinite(), CPU)
    saver = SimpleNamespace(due=lambda _: True, announce=lambda: None, save=saves.append)
    reporter = SimpleNamespace(due=lambda _: False, report=lambda *_: None)
    ignored = SimpleNamespace(publish=lambda: None, hit=lambda *_: None)
    books = LeadersBooks(Board(attempt=1), Curves(), None, reporter, saver, ignored, Metrics(), ignored, guard)
    for step, broken in enumerate((False, True, True, False), start=1):
        guard.note(step, torch.tensor(broken))
        books.close(step)
    assert saves == [1, 4]


# --- state ---

BASIS = Basis("lock", {"unet": "hash"})


def _trained(seed=0, names=("a", "b"), *, extras=False):
    generator = torch.Generator().manual_seed(seed)
    parameters = {name: torch.nn.Parameter(torch.randn(3, generator=generator)) for name in names}
    device = SimpleNamespace(torch=CPU, dtype=torch.float16 if extras else torch.float32)
    return made_trainable([Group(parameters)], Training(ema=Ema(enabled=extras, decay=0.9)), device=device)


def _step(trained, number):
    loss = sum(p.square().sum() for p in trained.parameters.values())
    (loss * trained.scale.value if trained.scale else loss).backward()
    apply_update(trained.optimizer, learning_rate=0.1, max_grad_norm=1.0, loss=loss.detach(), scale=trained.scale)
    if trained.average:
        trained.average.update(number)


def _copied(found):
    tensors = {g: {n: t.detach().clone() for n, t in group.items()} for g, group in found.tensors.items()}
    return Snapshot(found.step, tensors, json.loads(json.dumps(found.scalars)))


@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_state_goes_on_bit_for_bit(steps, extras):
    straight, first, second = (_trained(seed=seed, extras=extras) for seed in (0, 0, 1))
    for number in range(5):
        _step(straight, number + 1)
    for number in range(steps):
        _step(first, number + 1)
    first.guard.roll_backs = 2
    curves = Curves(points=[Point(step, 0.1, 0.1, 0.1) for step in range(1, steps + 1)])
    found = _copied(snapshot(steps, first, curves=curves, basis=BASIS))
    assert restore(found, second, basis=BASIS) == curves
    for number in range(steps, 5):
        _step(second, number + 1)
    for name in straight.parameters:
        assert torch.equal(straight.parameters[name], second.parameters[name])
    assert straight.extras().keys() == ({"average", "scale"} if extras else set())
    for group, tensors in straight.extras().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, second.extras()[group][name])
    assert second.guard.roll_backs == 2


def test_what_is_shown_is_the_average_where_there_is_one():
    trained = _trained(extras=True)
    _step(trained, 1)
    last, average = trained.weights(), trained.average.tensors()
    with trained.shown():
        assert all(torch.equal(weight, average[name]) for name, weight in trained.weights().items())
    assert all(torch.equal(weight, last[name]) for name, weight in trained.weights().items())
    assert not torch.equal(last["a"], average["a"])


def test_a_checkpoint_without_the_average_is_refused():
    saved = _copied(snapshot(0, _trained(), curves=Curves(), basis=BASIS))
    with pytest.raises(CheckpointUnsupported, match="another average"):
        restore(saved, _trained(extras=True), basis=BASIS)


def test_no_state_is_saved_with_curves_that_lag_behind():
    """Once, a save that fell due between two looks at the clock would have lost the losses of the last steps."""
    curves = _curves()
    with pytest.raises(ValueError, match="step 3: the curves are settled up to step 0"):
        snapshot(3, _trained(), curves=curves, basis=BASIS)
    curves.settle()
    assert snapshot(3, _trained(), curves=curves, basis=BASIS).step == 3


@pytest.mark.parametrize(
    ("basis", "field"),
    [(Basis("other", BASIS.model), "dataset.source"), (Basis(BASIS.dataset, {"unet": "other"}), "model.source")],
)
def test_another_basis_is_refused_by_name(basis, field):
    saved = _copied(snapshot(0, _trained(), curves=Curves(), basis=BASIS))
    with pytest.raises(BadData, match=field):
        restore(saved, _trained(), basis=basis)


def test_other_parameters_are_refused():
    saved = _copied(snapshot(0, _trained(), curves=Curves(), basis=BASIS))
    with pytest.raises(CheckpointUnsupported, match="step 0"):
        restore(saved, _trained(names=("a", "c")), basis=BASIS)


# --- results ---


def test_results_have_their_hashes_and_leave_a_receipt(tmp_path):
    state, store = open_store(f"file://{tmp_path}/state/"), open_store(f"file://{tmp_path}/out/")
    folder = tmp_path / "export"
    (folder / "diffusers").mkdir(parents=True)
    (folder / "diffusers" / "w").write_bytes(b"abc")
    files = output.upload(store, folder, [folder / "diffusers" / "w"])
    sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert files == (OutputFile(name="diffusers/w", sha256=sha, bytes=3),)
    assert store.get("diffusers/w") == b"abc"
    assert output.receipt(state, store, identity="x") is None
    results = output.Results(files, "stopped early", 7)
    output.sign(state, results, identity="x")
    assert output.receipt(state, store, identity="x") == results
    assert output.receipt(state, store, identity="another spec") is None
    store.delete("diffusers/w")
    assert output.receipt(state, store, identity="x") is None


def test_the_model_card_shows_how_to_load_the_weights():
    card = output.model_card(_run().spec, family="SD1", images=12, steps=2000)
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "12 images for 2000 steps" in card
    assert "load_lora_weights" in card
    assert "scheduler" not in card


def test_the_model_card_gives_the_base_model_the_schedule_of_an_adapter():
    spec = _run().spec
    asked = {"objective": {"predictionType": "VPrediction", "zeroTerminalSNR": True}}
    spec = TrainerSpec.model_validate(spec.to_json_object() | {"training": asked})
    card = output.model_card(spec, family="SD1", images=12, steps=2000)
    code = card.partition("```python\n")[2].partition("```")[0]
    assert compile(code.replace("<base model>", "base"), "card", "exec")
    assert 'rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction"' in code


def test_early_stopping_needs_an_image_that_can_be_spared():
    stopping = _run(training={}).spec.model_copy(update={"validation": Validation(early_stopping=EarlyStopping())})
    alone, held_out = (
        LockedImage(split[0], "a.png", 64, 64, "c", (64, 64), split) for split in ("train", "validation")
    )
    with pytest.raises(BadConfig, match=r"validation\.earlyStopping .* of 1 images none"):
        check_split(stopping, DatasetLock((alone,), {}, {}))
    check_split(stopping, DatasetLock((alone, held_out), {}, {}))
    check_split(_run().spec, DatasetLock((alone,), {}, {}))


def test_texts_that_are_longer_than_the_model_reads_are_told_of():
    prompts = [{"prompt": "short", "negativePrompt": "ugly, " * 50}]
    spec = TrainerSpec.model_validate(_run().spec.to_json_object() | {"validation": {"prompts": prompts}})
    images = tuple(
        LockedImage(f"{i}", f"{i}.png", 64, 64, caption, (64, 64), "train")
        for i, caption in enumerate(("a dog", "a cat", "a long story of " + 100 * "x", "a cat"))
    )
    family = SimpleNamespace(cut_off=lambda texts: [text for text in texts if len(text) > 77])
    lock = DatasetLock(images, {}, {})
    captions, samples = cut_off(spec, lock, TextPath(family))
    assert captions.startswith("1 of 3 captions are longer than the model reads")
    assert "'a long story of xxx" in captions
    assert samples.startswith("1 of 2 validation.prompts are longer")
    doubled = TextPath(family, written=lambda text: text * 20)  # a new word may be several
    assert [text[:6] for text in cut_off(spec, lock, doubled)] == ["3 of 3", "2 of 2"]
    assert list(cut_off(_run().spec, DatasetLock(images[:2], {}, {}), TextPath(family))) == []
