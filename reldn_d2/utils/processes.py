"""Start and end of worker processes: the user's modules, and signals of their parent."""

import ctypes
import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence

from .user_modules import import_modules, imported_modules

__all__ = ["end_with_parent", "loader_worker_init", "start_pool_worker"]

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


def start_pool_worker(modules: Sequence[str]) -> None:
    """Prepare a process of a pool: it ends with its parent and has the modules of ``--module``.

    Args:
        modules: :func:`.user_modules.imported_modules` of the parent.
    """
    end_with_parent()
    import_modules(modules)


def loader_worker_init() -> Callable[[int], None]:
    """Return the ``worker_init_fn`` of a ``DataLoader``.

    With the start methods spawn and forkserver, workers are new interpreters: they import the
    modules of ``--module`` again. All workers ignore interruptions: Ctrl-C and batch systems signal
    all processes of a run. Training then finishes its iteration, for which it still needs its
    workers; it ends them itself.
    """
    return functools.partial(_start_loader_worker, imported_modules())


def _start_loader_worker(modules: Sequence[str], worker_id: int) -> None:
    del worker_id
    _ignore_interruptions()
    import_modules(modules)


def _ignore_interruptions() -> None:
    """Ignore SIGINT, and any SIGTERM that does not come from the parent process."""
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

    threading.Thread(target=wait_for_parent, name="ignore_interruptions", daemon=True).start()
