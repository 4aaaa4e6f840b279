"""Freed memory stays with the process: what glibc says of it, in a process that has not coded a clip."""

from __future__ import annotations

import subprocess
import sys

from tests.native_heap import needs_mallinfo

SCRIPT = """
import psutil, torch
from tests.native_heap import heap
from vidit.vae.heap import keep_freed_memory

def mapped(mib):
    before = heap("hblks")
    block = torch.empty(mib * 2**20, dtype=torch.uint8)
    return heap("hblks") - before

print(mapped(30))  # its threshold follows what is freed: 31 MiB would be mapped still
before = psutil.Process().memory_info().rss
keep_freed_memory()
print(mapped(31), mapped(33), psutil.Process().memory_info().rss - before)
"""


@needs_mallinfo
def test_blocks_up_to_32_mib_are_not_mapped_by_themselves() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    before, within, above, grown = map(int, done.stdout.split())
    assert (before, within, above) == (1, 0, 1)
    assert grown < 2**20, "nothing is written to the block that raises the threshold"
