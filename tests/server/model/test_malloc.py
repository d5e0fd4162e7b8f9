"""Large arrays come from the heap, where they stay once freed."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Counts the mappings that one allocation of 24 MB makes, in a process whose thresholds nobody has moved yet.
SCRIPT = """
import ctypes, sys
from server.model.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype, libc.mallinfo2.restype = [ctypes.c_size_t], ctypes.c_void_p, Info
before = libc.mallinfo2().hblks
assert libc.malloc(24 << 20)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not run: glibc only")
@pytest.mark.parametrize(("how", "mappings"), [("as it is", 1), ("kept", 0)])
def test_large_arrays_come_from_the_heap(how: str, mappings: int) -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True)
    assert int(run.stdout) == mappings
