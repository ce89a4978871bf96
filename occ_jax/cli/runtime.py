"""Settings of the process that change no result and make it faster on CPUs."""

from __future__ import annotations

import ctypes
import sys

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEP = 64 * 2**20


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory instead of returning it to the kernel.

    XLA's CPU backend allocates its temporaries anew for every call. Above 128 KiB glibc maps them
    from the kernel and unmaps them after, and on small models the page faults cost as much as a
    quarter of the arithmetic. The process's footprint becomes its peak. Other C libraries are left
    alone.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_M_TOP_PAD, _KEEP)
