#!/usr/bin/env python3
"""A cluster on a device, asked by `paceline generate`: the same tokens alone and in a crowd, with and without
speculation, greedy and sampled, and greedy tokens that agree with the CPU's up to the first near-tie. One JSON object a line for each check; after one that
failed the exit code is 1 and the last line says which.

It starts its own clusters on free ports and stops them. Standard library only."""

import argparse
import concurrent.futures
import json
import pathlib
import statistics
import subprocess
import sys
import time

# Two tokens whose log probabilities differ by less than this are as good as equal for other arithmetic.
NEAR_TIE = 0.15
START_S, ANSWER_S = 90, 60
WORDS = "The quick brown fox jumps over the lazy dog, and nobody in the stadium saw where the race had gone. "
# Some shorter than a block of the KV cache, some longer than a step's share of prefill.
PROMPTS = ["Once", WORDS, "0123456789" * 7, WORDS * 3, "Zwölf Boxkämpfer", WORDS[17:60], "a b c d", WORDS * 8]


class Cluster:
    """A coordinator, one shard and perhaps a draft service, all on one device, while the block runs."""

    def __init__(self, paceline, model, device, draft=None):
        self.paceline = paceline
        self.command = [paceline, "up", "--model", model, "--device", device, "--ranks", "1"]
        self.command += ["--draft", draft] if draft else []
        self.command += ["--listen", "127.0.0.1:0"]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            line = reader.submit(self.process.stdout.readline)
            try:
                self.server = line.result(START_S).removeprefix("coordinator ").strip()
            except concurrent.futures.TimeoutError:
                self.process.kill()
                raise SystemExit(f"`{' '.join(self.command)}` is not ready after {START_S} s") from None
        if not self.server.startswith("http"):
            self.process.kill()
            raise SystemExit(f"`{' '.join(self.command)}` did not start")
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def generate(self, prompt, *options):
        command = [self.paceline, "generate", "--server", self.server, "--raw", "--json", "--ignore-eos", *options, "-"]
        done = subprocess.run(command, input=prompt, capture_output=True, text=True, timeout=ANSWER_S)
        if done.returncode != 0:
            raise SystemExit(f"generate failed: {done.stderr.strip()}")
        return json.loads(done.stdout)


class Checks:
    """What was checked, told at once."""

    def __init__(self):
        self.failed = []

    def add(self, check, is_ok, **fields):
        print(json.dumps({"check": check, "ok": is_ok, **fields}), flush=True)
        if not is_ok:
            self.failed.append(check)


def first_difference(left, right):
    """Index of the first token that differs; None when one is the other's beginning."""
    return next((i for i, (a, b) in enumerate(zip(left, right)) if a != b), None)


def requests(arguments):
    """Every prompt greedy and sampled."""
    length = ["--max-tokens", str(arguments.tokens)]
    asked = [(prompt, length + ["--temperature", "0"]) for prompt in PROMPTS]
    return asked + [(prompt, length + ["--temperature", "1", "--seed", str(i)]) for i, prompt in enumerate(PROMPTS)]


def at_once(cluster, asked, *options):
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda request: cluster.generate(request[0], *request[1], *options), asked))


def with_speculation(arguments, checks):
    """Every mode must give the same tokens. The model drafts for itself, which pays seldom: the counts say how often it did."""
    asked = requests(arguments)
    with Cluster(arguments.paceline, arguments.batch, arguments.device, draft=arguments.batch) as cluster:
        plain = at_once(cluster, asked, "--speculate", "off")
        answers = {mode: at_once(cluster, asked, "--speculate", mode) for mode in ["ngram", "draft", "auto"]}
    for mode, mode_answers in answers.items():
        differ = [i for i, (a, b) in enumerate(zip(plain, mode_answers)) if a["tokens"] != b["tokens"]]
        counts = [count for answer in mode_answers for count in answer.get("speculation", [])]
        proposed = sum(count["draft_tokens"] for count in counts)
        accepted = sum(count["accepted_tokens"] for count in counts)
        checks.add(f"speculation {mode}", not differ, differ=differ, proposed=proposed, accepted=accepted)


def alone_and_together(arguments, checks):
    """One after the other, then all at once."""
    asked = requests(arguments)
    with Cluster(arguments.paceline, arguments.batch, arguments.device) as cluster:
        alone = [cluster.generate(prompt, *options) for prompt, options in asked]
        again = cluster.generate(*[asked[-1][0], *asked[-1][1]])
        started = time.monotonic()
        together = at_once(cluster, asked)
        seconds = time.monotonic() - started
    speed = statistics.median(answer["timings"]["decode_tokens_per_second"] for answer in alone)
    n_tokens = sum(len(answer["tokens"]) for answer in alone)
    checks.add("all tokens came", n_tokens == len(asked) * arguments.tokens, tokens=n_tokens)
    checks.add("the same twice", again["tokens"] == alone[-1]["tokens"], decode_tokens_per_s=round(speed, 1))
    differ = [i for i, (a, b) in enumerate(zip(alone, together)) if a["tokens"] != b["tokens"]]
    rate = round(n_tokens / seconds, 1)
    checks.add("alone and together", not differ, requests=len(asked), differ=differ, tokens_per_s_together=rate)
    n_distinct = len({token for answer in alone for token in answer["tokens"]})
    checks.add("tokens vary", n_distinct > 10, distinct=n_distinct)


def against_cpu(arguments, model, checks):
    """Greedy tokens of both, compared up to where they part; there the CPU must have had two good choices."""
    options = ["--max-tokens", str(arguments.tokens), "--temperature", "0", "--logprobs", "2"]
    answers = {}
    for device in ["cpu", arguments.device]:
        with Cluster(arguments.paceline, model, device) as cluster:
            answers[device] = [cluster.generate(prompt, *options) for prompt in PROMPTS[:4]]
    n_same, partings = 0, []
    for ours, device in zip(answers["cpu"], answers[arguments.device]):
        at = first_difference(ours["tokens"], device["tokens"])
        n_same += arguments.tokens if at is None else at
        if at is not None:
            best, second = ours["logprobs"][at]["top"][:2]
            partings.append({"token": at, "margin": round(best[1] - second[1], 4)})
    is_ok = all(parting["margin"] < NEAR_TIE for parting in partings)
    name = pathlib.Path(model).name
    n_tokens = arguments.tokens * len(answers["cpu"])
    checks.add(f"CPU and device agree on {name}", is_ok, tokens=n_tokens, same=n_same, partings=partings)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--paceline", required=True)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--batch", required=True, metavar="MODEL", help="asked alone and together")
    parser.add_argument("--against-cpu", action="append", default=[], metavar="MODEL", help="asked on both devices")
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    checks = Checks()
    for model in arguments.against_cpu:
        against_cpu(arguments, model, checks)
    alone_and_together(arguments, checks)
    with_speculation(arguments, checks)
    if checks.failed:
        print(f"failed: {', '.join(checks.failed)}")
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        # The last line of standard output is the verdict.
        if isinstance(end.code, str):
            print(end.code)
            sys.exit(1)
        raise
