"""Processes that stay up between tests and compute together, over gloo."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import traceback

import coverage

TIMEOUT = 240

# Imported once, by the server that forks the processes: what the jobs import that is installed.
IMPORTS = ["hyperadam.metatrain", "torch.distributed.checkpoint", "torch.distributed.fsdp"]


def _serve(rank, size, rendezvous, inbox, outbox, measured):
    measure = coverage.Coverage(data_suffix=True) if measured else None
    if measure is not None:
        measure.start()  # pytest-cov joins what it saves
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size
    )
    while (work := inbox.get()) is not None:
        job, arguments = work
        try:
            outbox.put((rank, None, job(rank, size, *arguments)))
        except BaseException:
            outbox.put((rank, traceback.format_exc(), None))
    distributed.destroy_process_group()
    if measure is not None:
        measure.stop()
        measure.save()
    os._exit(0)  # to take torch down takes seconds


class Pool:
    """So many processes, each a rank of one group.

    A test that leaves them in different places ends them; the next one has new ones.
    """

    def __init__(self, size, folder):
        self.size = size
        self.folder = folder
        self.processes = []
        self.started = 0

    def _start(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        self.outbox = context.Queue()
        self.inboxes = [context.Queue() for _ in range(self.size)]
        self.started += 1
        rendezvous = self.folder / f"rendezvous-{self.size}-{self.started}"
        measured = coverage.Coverage.current() is not None
        self.processes = [
            context.Process(
                target=_serve,
                args=(rank, self.size, rendezvous, inbox, self.outbox, measured),
                daemon=True,
            )
            for rank, inbox in enumerate(self.inboxes)
        ]
        for process in self.processes:
            process.start()

    def run(self, job, *arguments):
        """``job(rank, size, *arguments)`` in each process: the results by rank."""
        if not self.processes:
            self._start()
        for inbox in self.inboxes:
            inbox.put((job, arguments))
        results, failure = {}, None
        while len(results) < self.size and failure is None:
            try:
                rank, error, result = self.outbox.get(timeout=TIMEOUT)
            except queue.Empty:
                failure = f"ranks {sorted(set(range(self.size)) - set(results))} do not answer"
                break
            results[rank] = result
            if error is not None:
                failure = f"rank {rank}:\n{error}"
        if failure is not None:
            self.kill()
            raise RuntimeError(failure)
        return [results[rank] for rank in range(self.size)]

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes = []

    def close(self):
        for inbox in self.inboxes if self.processes else []:
            with contextlib.suppress(ValueError):
                inbox.put(None)
        for process in self.processes:
            process.join(10)
        self.kill()
