"""On this CPU, from how many keys on is attention faster in bf16 than in fp32?

    python -m benchmarks.cpu_attention

Forward and backward of `scaled_dot_product_attention` in both dtypes, casts not counted, at equal numbers of
tokens. `vidit.model.core.CPU_SHORT` follows from it.
"""

import json
import statistics
import time

import torch
import torch.nn.functional as F

from benchmarks.record import write_result

TOKENS = 8192
HEADS, HEAD_DIM = 6, 32
LENGTHS = (16, 48, 128, 256, 512, 1024, 2048)


def milliseconds(length: int, dtype: torch.dtype, repeats: int = 7) -> float:
    """Median time of forward and backward over TOKENS tokens in sequences of `length`."""
    shape = (TOKENS // length, length, HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        F.scaled_dot_product_attention(q, k, v).sum().backward()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[1:])


def main() -> None:
    rows = [
        {"keys": n, "bf16_ms": milliseconds(n, torch.bfloat16), "fp32_ms": milliseconds(n, torch.float32)}
        for n in LENGTHS
    ]
    path = write_result("cpu-attention", {"tokens": TOKENS, "heads": HEADS, "head_dim": HEAD_DIM, "rows": rows})
    for row in rows:
        print(json.dumps({key: round(value, 2) for key, value in row.items()}))
    print(path)


if __name__ == "__main__":
    main()
