#!/usr/bin/env python3
"""Shows the results of `tests/device/run` as a table, and which goals were met. Reads results.jsonl."""

import json
import sys

# Least share of the copy bandwidth for decoding, and of the matrix peak for prefill, of the 7B shape in bf16.
DECODE_SHARE, PREFILL_SHARE = 0.70, 0.45
# Multiply-adds of a row in the matrices of all layers: 2 floating-point operations each.
ROW_PRODUCTS = {"qwen2.5-7b": 6_525_288_448, "qwen2.5-1.5b": 1_310_195_712, "qwen2.5-0.5b": 357_826_560}
# Least ratio to transformers' generate.
RATIOS = {"qwen2.5-7b": 1.5, "qwen2.5-1.5b": 2.0}


def lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def number(value, form):
    return "-" if value is None else format(value, form)


def add_shares(speed, limits):
    """Of the copy bandwidth, by the bytes of weights and KV cache that were read; of the matrix peak, by the products of
    the layers' matrices (attention and the output head are not counted)."""
    for line in speed:
        copy, peak = limits.get("copy_gb_per_s"), limits.get("bf16_tflop_per_s")
        if copy and line.get("gb_per_s"):
            line["share_of_bandwidth"] = line["gb_per_s"] / copy
        if peak and line["model_shape"] in ROW_PRODUCTS:
            line["share_of_peak"] = 2e-12 * ROW_PRODUCTS[line["model_shape"]] * line["tokens_per_s"] / peak


def speed_table(speed):
    print("\nmodel                 shape        tokens/s     GB/s  of copy  of peak   ms/pass")
    for line in speed:
        shares = [number(line.get(key), ".1%") for key in ("share_of_bandwidth", "share_of_peak")]
        print(
            f"{line['model_shape'] + ' ' + line['type']:<21} {line['shape']:<10} {number(line.get('tokens_per_s'), '10.1f')}"
            f" {number(line.get('gb_per_s'), '8.1f')} {shares[0]:>8} {shares[1]:>8} {number(line.get('ms_per_pass'), '9.3f')}"
        )


def peer_table(ours, peers):
    """Decoding of one sequence beside the other library's; gives the ratio of each shape."""
    ratios = {}
    for peer in peers:
        shape = peer["model_shape"]
        own = ours.get((shape, "bf16", "tg128"), {}).get("tokens_per_s")
        text = f"\ntransformers {shape} bf16 ({peer['compile']}): {peer['tokens_per_s']:.1f} tokens/s"
        if own:
            ratios[shape] = own / peer["tokens_per_s"]
            text += f"; paceline {own:.1f}, {ratios[shape]:.2f} times"
        print(text, end="")
    if peers:
        print()
    return ratios


def goals(ours, ratios):
    found = []
    decode = ours.get(("qwen2.5-7b", "bf16", "tg128"), {}).get("share_of_bandwidth")
    prefill = ours.get(("qwen2.5-7b", "bf16", "pp2048"), {}).get("share_of_peak")
    found.append(("7B bf16 decode, share of the copy bandwidth", decode, DECODE_SHARE))
    found.append(("7B bf16 prefill, share of the matrix peak", prefill, PREFILL_SHARE))
    found += [(f"{shape} bf16, times transformers", ratios.get(shape), goal) for shape, goal in RATIOS.items()]
    return found


def main():
    results = lines(sys.argv[1])
    of = lambda section: [line for line in results if line.get("section") == section]  # noqa: E731
    speed = [line for line in of("speed") if "shape" in line]
    limits = [line for line in of("limits") if "copy_gb_per_s" in line]
    add_shares(speed, limits[-1] if limits else {})
    peers = [line for line in of("peer") if line.get("phase") == "measured"]
    ours = {(line["model_shape"], line["type"], line["shape"]): line for line in speed}
    if speed:
        speed_table(speed)
    ratios = peer_table(ours, peers)
    measured = [goal for goal in goals(ours, ratios) if goal[1] is not None]
    if measured:
        print("\ngoal                                             found     asked")
    for name, value, least in measured:
        print(f"{name:<46} {value:>7.2f}  >= {least:.2f}  {'met' if value >= least else 'MISSED'}")


if __name__ == "__main__":
    main()
