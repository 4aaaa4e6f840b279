"""What glibc says of its heap."""

from __future__ import annotations

import ctypes
import sys

import pytest

FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Mallinfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc: mallinfo(3) tells what the fields are."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def heap(field: str) -> int:
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Mallinfo
    return int(getattr(libc.mallinfo2(), field))


needs_mallinfo = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33"
)
