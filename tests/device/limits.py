#!/usr/bin/env python3
"""What the GPU can do, measured with PyTorch: bytes of a device-to-device copy (read and written) and bf16 products of
8192 x 8192 matrices of random numbers. One JSON object."""

import json
import sys

import torch


def seconds(work, n_warm_up, n):
    """Seconds of one call, by the device's clock."""
    for _ in range(n_warm_up):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(n):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / n


def main():
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda:0"
    with torch.cuda.device(device):
        n_bytes = 4 << 30
        source = torch.empty(n_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copy = seconds(lambda: target.copy_(source), 3, 20)
        del source, target
        n = 8192
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        product = seconds(lambda: a @ b, 5, 40)
    limits = {"copy_gb_per_s": 2 * n_bytes / copy / 1e9, "bf16_tflop_per_s": 2 * n**3 / product / 1e12}
    print(json.dumps({name: round(value, 1) for name, value in limits.items()}))


if __name__ == "__main__":
    main()
