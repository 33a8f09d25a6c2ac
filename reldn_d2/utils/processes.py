"""Signals of worker processes: they end with their parent, and only their parent ends them."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time

__all__ = ["end_with_parent", "protect_loader_worker"]

_PR_SET_PDEATHSIG = 1  # from Linux's <sys/prctl.h>


def end_with_parent(grace: float = 30.0) -> None:
    """Make this process end when its parent ends, however that happens.

    It first gets SIGTERM, so that training can write a checkpoint, and is ended after ``grace``
    seconds, because it may wait for processes that are gone. To be called by a process that
    ``multiprocessing`` started.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if sys.platform == "linux":  # the kernel's signal arrives even if no Python thread can run
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    def watch() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def protect_loader_worker(worker_id: int = 0) -> None:
    """Make a loader's worker ignore interruptions, as ``worker_init_fn`` of a ``DataLoader``.

    Ctrl-C and batch systems signal all processes of a run. Training then finishes its iteration,
    for which it still needs its workers; it ends them itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None or not hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        return
    # Only sigwaitinfo tells who sent a signal; it needs the signal to be blocked in all threads,
    # and threads that start later inherit this one's mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])

    def wait_for_parent() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent.pid:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_parent, name="protect_loader_worker", daemon=True).start()
