#!/usr/bin/env python3
"""Decode speed of the transformers library on a model directory: `generate` with a static KV cache and a compiled
forward pass, as in the guide "Optimizing inference". One JSON object a line, for each phase; the last one has the speed.

The time of one token is the difference between a long and a short generation of the same prompt, divided by the
difference of their lengths, so that prefill and what is paid once a call fall out. Nothing ends a generation early.

  --compile guide   model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
  --compile auto    what `generate` compiles by itself for a static cache on a GPU
  --compile none    nothing"""

import argparse
import json
import os
import statistics
import sys
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402


def say(phase, **fields):
    print(json.dumps({"phase": phase, **fields}), flush=True)


class Model:
    """A model, ready to generate."""

    def __init__(self, path, device, dtype):
        placed = {} if device == "cpu" else {"device_map": device}
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(path, dtype=dtype, attn_implementation="sdpa", **placed).eval()
        self.device = device
        config = self.model.generation_config
        config.cache_implementation = "static"
        config.do_sample = False
        config.eos_token_id, config.pad_token_id = None, 0

    def compile(self, how):
        if how == "guide":
            self.model.forward = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)
        else:
            self.model.generation_config.disable_compile = how == "none"

    def synchronize(self):
        if self.device != "cpu":
            torch.cuda.synchronize()

    def seconds(self, prompt, n_tokens):
        """How long `generate` takes for that many new tokens."""
        self.synchronize()
        started = time.perf_counter()
        mask = torch.ones_like(prompt)
        tokens = self.model.generate(prompt, attention_mask=mask, min_new_tokens=n_tokens, max_new_tokens=n_tokens)
        self.synchronize()
        seconds = time.perf_counter() - started
        n_new = tokens.shape[1] - prompt.shape[1]
        assert n_new == n_tokens, f"{n_new} tokens instead of {n_tokens}"
        return seconds


def compiled(model, how, prompt, n_tokens):
    """Compiles and warms up, with the longest generation first: a longer one later would compile again."""
    ways = [how] if how != "guide" else ["guide", "auto"]
    plain_forward = model.model.forward
    for way in ways:
        try:
            model.compile(way)
            times = [model.seconds(prompt, n_tokens) for _ in range(2)]
            say("compiled", compile=way, seconds=round(sum(times), 2), second_call_seconds=round(times[1], 3))
            return way
        except Exception as error:  # the library's or the compiler's: the next way may work
            if way == ways[-1]:
                raise
            print(f"compiling as in the guide failed, now as `generate` does: {error}", file=sys.stderr)
            model.model.forward = plain_forward
            torch._dynamo.reset()


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--model", required=True, help="directory in the Hugging Face layout")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("--lengths", default="32,160", help="new tokens of the short and the long generation")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--compile", choices=["guide", "auto", "none"], default="guide")
    arguments = parser.parse_args()
    short, long = (int(length) for length in arguments.lengths.split(","))
    assert 0 < short < long, "--lengths: a short one, then a longer one"

    started = time.perf_counter()
    model = Model(arguments.model, arguments.device, getattr(torch, arguments.dtype))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    say("loaded", seconds=round(time.perf_counter() - started, 2), **versions)
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.batch, arguments.prompt)
    prompt = torch.randint(model.model.config.vocab_size, shape, generator=generator).to(arguments.device)
    way = compiled(model, arguments.compile, prompt, long)
    model.seconds(prompt, short)
    pairs = [(model.seconds(prompt, short), model.seconds(prompt, long)) for _ in range(arguments.repeat)]
    per_token = [(of_long - of_short) / (long - short) for of_short, of_long in pairs]
    rates = sorted(arguments.batch / seconds for seconds in per_token)
    whole = statistics.median(arguments.batch * long / of_long for _, of_long in pairs)
    say(
        "measured",
        compile=way,
        batch=arguments.batch,
        tokens_per_s=round(statistics.median(rates), 2),
        tokens_per_s_min=round(rates[0], 2),
        tokens_per_s_max=round(rates[-1], 2),
        tokens_per_s_with_prefill=round(whole, 2),
        ms_per_token=round(1e3 * statistics.median(per_token), 3),
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
