"""Memory that is freed between two layers of a VAE on a CPU stays with the process."""

import functools

import numpy as np

# mallopt(3), M_MMAP_THRESHOLD: glibc's most is 32 MiB, with the block's own header and the rounding to pages in it.
_BYTES = 32 * 2**20 - 2**14


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc's heap hold back 64 MiB of what is freed, where it gives all above 128 KiB back to the system at first.

    A coded clip frees and asks for the same few MiB with every layer: to map and clear them anew took a tenth to a
    seventh of the time. glibc raises both of its thresholds when a mapped block is freed; nothing is written to this
    one, so it is never resident. Where MALLOC_ variables are set, or another library allocates, nothing changes.
    """
    np.empty(_BYTES, np.uint8)  # torch would write to it where algorithms are deterministic
