"""How the C library handles memory that is freed."""

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of glibc's mallopt(3)


def keep_freed_memory() -> bool:
    """Make the C library keep what this process frees, instead of giving it back to the system.

    Every training step on the CPU allocates and frees the same tensors, several GB. The system
    clears each page that it hands out again, which takes a seventh of the time of a step. In
    other threads than the main one, tensors of more than 64 MiB are still given back.

    Returns:
        Whether the C library can do it: glibc can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1) and mallopt(_M_MMAP_MAX, 0))
