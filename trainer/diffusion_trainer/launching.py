"""The training processes of one pod: started through torch's launcher, told to stop, and asked why they ended.

`elastic_launch` rather than `accelerate launch` or `torchrun`: it keeps the true exit code and signal of a child. It
runs in a thread, because the main thread is the one that hears signals, and must not wait inside C++ for other pods.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from operator import itemgetter
from pathlib import Path

from pydantic import ValidationError

from diffusion_api.outcomes import ExitCode
from diffusion_api.run import LastWord, RunConfig
from diffusion_trainer.endings import CRASH, Ending, ending_of, root_cause
from diffusion_trainer.errors import PeerLost
from diffusion_trainer.progress import Board
from diffusion_trainer.settings import Settings
from diffusion_trainer.stopping import StopSignal, Yielded

LOG = logging.getLogger(__name__)
START_METHOD = "spawn"  # a fork of a process with threads, and perhaps CUDA, is not safe
MEETING_SECONDS = 24 * 3600
"""How long the pods of an attempt wait for each other. Whether that is too long is the operator's to say."""
LEAVING_SECONDS = 10
"""How long the others may take to end when one process of the pod has failed."""
WATCH_SECONDS = 0.2
SIGNAL_BASE = 128  # what a shell makes of a signal
_WORDS = "words"

Entry = Callable[[Settings], int]


@dataclass
class _Children:
    """The training processes of this pod as their parent sees them: when each of them ended, whoever reaps it."""

    seen: dict[int, BaseProcess] = field(default_factory=dict)
    ended_at: dict[int, float] = field(default_factory=dict)

    def look(self, *, now: float) -> None:
        """Note which have ended."""
        for child in multiprocessing.active_children():
            if child.pid is not None:
                self.seen.setdefault(child.pid, child)
        for pid in self.seen.keys() - self.ended_at.keys():
            try:
                ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            except ChildProcessError:
                ended = True  # the launcher was first
            if ended:
                self.ended_at[pid] = now

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to those that run."""
        for pid in self.seen.keys() - self.ended_at.keys():
            os.kill(pid, number)

    def codes(self) -> dict[int, int]:
        """Return exit codes, or minus signals, by process id in the order of the ends.

        Left out is what the launcher killed: the rest, a while after the first has failed.
        """
        first = min(self.ended_at.values(), default=0.0)
        own = [pid for pid, at in sorted(self.ended_at.items(), key=itemgetter(1)) if at < first + LEAVING_SECONDS - 1]
        return {pid: self.seen[pid].exitcode or 0 for pid in own}


def launch(run: RunConfig, settings: Settings, *, entry: Entry, board: Board, stop: StopSignal) -> Ending:
    """Run `entry` in each training process of this pod; return how they ended, with their news on the board.

    Each process watches itself for hangs; here is no more to do than to pass a stop on.
    """
    folder = settings.work / _WORDS
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():  # by an earlier attempt, where it had the same disk
        left.unlink()
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // run.processes_per_node)))
    if run.nodes == 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if run.device == "CUDA":
        spare_peer_to_peer(os.environ)
    LOG.info("attempt %d: %d training processes on node %d", run.attempt, run.processes_per_node, run.node_rank)
    errors: list[Exception] = []
    thread = threading.Thread(target=_run, args=(run, settings, entry, errors), name="launcher", daemon=True)
    thread.start()
    children, told = _Children(), False
    while thread.is_alive():
        thread.join(WATCH_SECONDS)
        board.update()
        children.look(now=time.time())
        if stop.requested and not told:
            if not children.seen:
                return ending_of(Yielded())  # still waiting for other pods: there is nothing to save
            told = True
            children.tell(signal.SIGTERM)
    children.look(now=time.time())
    words = words_of(settings.work)
    adopt(board, words)
    return _ending(run, settings, children, errors=errors)


def spare_peer_to_peer(environ: MutableMapping[str, str]) -> None:
    """Set what NCCL needs on GeForce cards whose driver claims transfers between them that never end.

    accelerate knows which: RTX 40 with drivers before 550. What the profile or the user has set stays.
    """
    from accelerate.utils import check_cuda_p2p_ib_support

    if not check_cuda_p2p_ib_support():
        for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE"):
            environ.setdefault(name, "1")


def word_file(work: Path, local_rank: int) -> Path:
    """Return where a training process of this pod leaves its last word."""
    return work / _WORDS / f"{local_rank}.json"


def words_of(work: Path) -> dict[int, LastWord]:
    """Return the last words of this pod's training processes, by local rank."""
    return {int(path.stem): word for path, word in _words(work)}


def _words(work: Path) -> Iterator[tuple[Path, LastWord]]:
    for path in sorted((work / _WORDS).glob("*.json")):
        try:
            yield path, LastWord.model_validate_json(path.read_bytes())
        except ValidationError:
            LOG.warning("process %s was killed within its last word", path.stem)


def adopt(board: Board, words: Mapping[int, LastWord]) -> None:
    """Put on the pod's board what the processes' were: of steps and checkpoints the lowest rank knows most."""
    if not words:
        return
    first = words[min(words)]
    board.update(
        step=first.step,
        progress=first.progress,
        resumed_from_step=first.resumed_from_step,
        latest_checkpoint=first.latest_checkpoint,
        best_checkpoint=first.best_checkpoint,
        output=first.output,
        stopped_early_at=first.stopped_early_at,
        micro_batch_size=first.micro_batch_size,
    )
    for word in words.values():
        for warning in word.warnings:
            board.warn(warning)


def introduce(work: Path, local_rank: int) -> None:
    """Leave this process's id beside its last word to come, for the case that it cannot say one."""
    word_file(work, local_rank).with_suffix(".pid").write_text(str(os.getpid()))


def _ending(run: RunConfig, settings: Settings, children: _Children, *, errors: Sequence[Exception]) -> Ending:
    """Return how the pod's processes ended together."""
    ends = [(path.stat().st_mtime, _said(word)) for path, word in _words(settings.work)]
    ranks = {int(path.read_text()): int(path.stem) for path in (settings.work / _WORDS).glob("*.pid")}
    for pid, code in children.codes().items():
        local_rank = ranks.get(pid)
        if code and (local_rank is None or not word_file(settings.work, local_rank).exists()):
            rank = None if local_rank is None else run.node_rank * run.processes_per_node + local_rank
            ends.append((children.ended_at[pid], _without_a_word(rank, code, on_gpu=run.device == "CUDA")))
    ends += [(math.inf, ending_of(error)) for error in errors]
    if not ends:
        return Ending(CRASH, "no training process said how it ended")
    return root_cause([ending for _, ending in sorted(ends, key=itemgetter(0))])


def _said(word: LastWord) -> Ending:
    return Ending(word.exit_code, word.message, tuple(word.last_lines.splitlines()))


def _without_a_word(rank: int | None, code: int, *, on_gpu: bool) -> Ending:
    """Return the ending of a process that could not speak: killed, or aborted from C++."""
    who = f"training process {rank}" if rank is not None else "a training process"
    if code == -signal.SIGTERM:
        return ending_of(Yielded())  # told to stop before it could hear, by us or by the launcher
    if code == -signal.SIGABRT and on_gpu:
        return Ending(ExitCode.COLLECTIVE_TIMEOUT, f"{who} was ended by NCCL: the others do not answer")
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; SIGKILL mostly means that the pod is short of memory" if code == -signal.SIGKILL else ""
        return Ending(SIGNAL_BASE - code, f"{who} was ended by {name}{hint}")
    return Ending(code, f"{who} ended with exit code {code} and without a word")


def _run(run: RunConfig, settings: Settings, entry: Entry, errors: list[Exception]) -> None:
    """Be the launcher: return when all processes of this pod have ended."""
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    host, port = (run.rendezvous.host, run.rendezvous.port) if run.rendezvous else ("127.0.0.1", _free_port())
    config = LaunchConfig(
        min_nodes=run.nodes,
        max_nodes=run.nodes,
        nproc_per_node=run.processes_per_node,
        run_id=f"{run.job.uid}-{run.attempt}",
        rdzv_backend="static",
        rdzv_endpoint=f"{host}:{port}",
        rdzv_configs={"rank": run.node_rank, "timeout": MEETING_SECONDS},
        max_restarts=0,
        monitor_interval=WATCH_SECONDS,
        start_method=START_METHOD,
        shutdown_timeout=LEAVING_SECONDS,
        local_addr="127.0.0.1" if run.nodes == 1 else None,
        logs_specs=DefaultLogsSpecs(log_dir=str(settings.work / "scratch" / "launcher")),
    )
    _hush_launcher()
    try:
        elastic_launch(config, entry)(settings)
    except ChildFailedError:
        LOG.info("the processes of this pod have ended")  # how, each of them has said itself
    except dist.DistError as error:
        errors.append(PeerLost(f"the pods of the attempt did not find each other at {host}:{port}: {error}"))
    except Exception as error:  # noqa: BLE001 - handed to the main thread
        errors.append(error)


def _hush_launcher() -> None:
    """Keep torch's account of ends and signals out of the log: it tells less than ours, in more lines."""
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
