"""Several ranks over gloo without a launcher: processes forked from this one, which has imported everything already."""

import multiprocessing
import os
import pickle
import socket
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from sa3dist.runtime.process_group import Group


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world_size, work, timeout_seconds=60, method="fork"):
    """``work(group)`` on every rank; what each returned, in rank order."""
    pipes, processes = _start(world_size, work, method)
    results = []
    # All first: a rank leaves only when the others have sent theirs.
    for pipe in pipes:
        assert pipe.poll(timeout_seconds), "a rank has not answered"
        results.append(pickle.loads(pipe.recv_bytes()))
    for process in processes:
        process.join(timeout_seconds)
    return results


def exit_codes(world_size, work, timeout_seconds=60, stopped=()):
    """Exit code of every rank, for ``work`` that ends its process itself.

    stopped   ranks that freeze themselves; they are killed when the others have ended, and have none
    """
    _, processes = _start(world_size, work)
    for dist_rank, process in enumerate(processes):
        if dist_rank in stopped:
            continue
        process.join(timeout_seconds)
        if process.exitcode is None:
            process.kill()
            raise AssertionError("a rank hangs")
    codes = [process.exitcode for process in processes]
    for dist_rank in stopped:
        processes[dist_rank].kill()
    return codes


def _start(world_size, work, method="fork"):
    context = multiprocessing.get_context(method)
    port = free_port()
    pipes, processes = [], []
    for dist_rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        pipes.append(ours)
        arguments = (work, dist_rank, world_size, port, theirs)
        processes.append(context.Process(target=_rank, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
    return pipes, processes


def _rank(work, dist_rank, world_size, port, pipe):
    torch.set_num_threads(1)
    hosts = tuple(f"host-{number}" for number in range(world_size))
    group = Group(dist_rank, world_size, torch.device("cpu"), hosts=hosts)
    os.environ |= {"RANK": str(dist_rank), "WORLD_SIZE": str(world_size)}
    if world_size > 1:
        store = dist.TCPStore("127.0.0.1", port, world_size, is_master=dist_rank == 0)
        timeout = timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=dist_rank, world_size=world_size, timeout=timeout)
    try:
        pipe.send_bytes(pickle.dumps(work(group)))
        if world_size > 1:
            # The store is rank 0's: it must not leave first.
            dist.barrier()
    except BaseException:
        traceback.print_exc()
    finally:
        # Forked from a test runner: nothing of its own clean-up is ours to do.
        os._exit(0)
