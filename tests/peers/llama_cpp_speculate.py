"""Answers prompts with llama.cpp, plainly or with speculation, and prints tokens/s after the first token and what was
accepted. llama.cpp's own speculative loop is in its programs, not in the library that llama-cpp-python has; this is the
same loop over the same library: the draft model proposes up to --draft-max tokens while it is at least --p-min sure, the
target verifies all of them in one pass, both keep what agrees. Mode ngram takes its proposals from llama-cpp-python's
LlamaPromptLookupDecoding. Greedy, one sequence, logits only of rows that are looked at."""

import argparse
import ctypes
import json
import sys
import time
import types

import llama_cpp as llama
import numpy as np
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from llama_cpp_shapes import PASS_ROWS, Engine

CONTEXT = 2048


class Sequence:
    """One sequence of a model: what its KV memory holds, and what it says next."""

    def __init__(self, path, threads):
        options = types.SimpleNamespace(model=path, threads=threads, no_repack=False)
        self.engine = Engine(options, CONTEXT - 1, 1)
        self.vocab = llama.llama_model_get_vocab(self.engine.model)
        self.held = []

    def cut(self, n_tokens):
        """Forgets all tokens but the first."""
        if n_tokens < len(self.held):
            llama.llama_memory_seq_rm(llama.llama_get_memory(self.engine.context), 0, n_tokens, -1)
            del self.held[n_tokens:]

    def run(self, tokens, n_outputs):
        """Appends tokens; the best token after each of the last `n_outputs`."""
        best = []
        for start in range(0, len(tokens), PASS_ROWS):
            part, first = tokens[start : start + PASS_ROWS], len(self.held)
            wanted = lambda i: start + i >= len(tokens) - n_outputs
            best += self.engine.step([(token, first + i, 0, wanted(i)) for i, token in enumerate(part)])
            self.held += part
        return best

    def sureness(self):
        """Probability of the best token after the last row."""
        pointer = llama.llama_get_logits_ith(self.engine.context, -1)
        floats = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(floats, shape=(self.engine.n_vocab,))
        return 1.0 / float(np.exp(logits - logits.max()).sum())


class DraftModel:
    """Proposes with a second model."""

    def __init__(self, path, arguments):
        self.sequence, self.most, self.least = Sequence(path, arguments.threads), arguments.draft_max, arguments.p_min

    def propose(self, tokens, room):
        sequence, held = self.sequence, self.sequence.held
        pairs = enumerate(zip(held, tokens))
        same = next((i for i, (one, other) in pairs if one != other), min(len(held), len(tokens)))
        sequence.cut(min(same, len(tokens) - 1))
        proposal, new = [], tokens[len(held) :]
        while len(proposal) < min(self.most, room):
            [token] = sequence.run(new, 1)
            if sequence.sureness() < self.least:
                break
            proposal.append(token)
            new = [token]
        return proposal


class Lookup:
    """Proposes from the sequence's own tokens."""

    def __init__(self):
        self.lookup = LlamaPromptLookupDecoding()

    def propose(self, tokens, room):
        return [int(token) for token in self.lookup(np.array(tokens, dtype=np.intc))[:room]]


class Nobody:
    def propose(self, tokens, room):
        return []


def prompt_tokens(sequence, text):
    """A user's turn in the model's chat format."""
    template = llama.llama_model_chat_template(sequence.engine.model, None)
    message = (llama.llama_chat_message * 1)(llama.llama_chat_message(b"user", text.encode()))
    buffer = ctypes.create_string_buffer(len(text.encode()) + 1024)
    n_bytes = llama.llama_chat_apply_template(template, message, 1, True, buffer, len(buffer))
    if not 0 < n_bytes <= len(buffer):
        raise SystemExit("llama.cpp does not know the model's chat format")
    tokens = (llama.llama_token * len(buffer))()
    n_tokens = llama.llama_tokenize(sequence.vocab, buffer.raw, n_bytes, tokens, len(tokens), True, True)
    return list(tokens[:n_tokens])


def answer(target, proposer, prompt, max_tokens):
    """Tokens, seconds after the first of them, and numbers of proposed and accepted tokens."""
    target.cut(0)
    said = target.run(prompt, 1)
    started, n_proposed, n_accepted = time.perf_counter(), 0, 0
    while len(said) < max_tokens and not llama.llama_vocab_is_eog(target.vocab, said[-1]):
        proposal = proposer.propose(prompt + said, max_tokens - len(said) - 1)
        best = target.run([said[-1], *proposal], len(proposal) + 1)
        pairs = enumerate(zip(proposal, best))
        n = next((i for i, (one, other) in pairs if one != other), len(proposal))
        new = best[: n + 1]
        end = next((i for i, token in enumerate(new) if llama.llama_vocab_is_eog(target.vocab, token)), n)
        said += new[: end + 1]
        target.cut(len(prompt) + len(said) - 1)
        n_proposed, n_accepted = n_proposed + len(proposal), n_accepted + n
    return said, time.perf_counter() - started, n_proposed, n_accepted


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft")
    parser.add_argument("--modes", default="off,ngram,draft")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--draft-max", type=int, default=16, help="most tokens of a proposal, as many as llama.cpp takes unless told")
    parser.add_argument("--p-min", type=float, default=0.75, help="how sure the draft must be of each token; llama.cpp has had 0.9")
    arguments = parser.parse_args()
    prompts = json.load(sys.stdin)
    target = Sequence(arguments.model, arguments.threads)
    proposers = {"off": Nobody, "ngram": Lookup, "draft": lambda: DraftModel(arguments.draft, arguments)}
    proposers = {mode: proposers[mode]() for mode in arguments.modes.split(",")}
    sums = {mode: [0, 0.0, 0, 0, 0] for mode in proposers}
    for prompt in (prompt_tokens(target, prompt) for prompt in prompts):
        plain = None
        for mode, proposer in proposers.items():
            said, seconds, n_proposed, n_accepted = answer(target, proposer, prompt, arguments.max_tokens)
            plain = plain or said
            more = (len(said) - 1, seconds, n_proposed, n_accepted, said != plain)
            sums[mode] = [one + other for one, other in zip(sums[mode], more)]
    for mode, (n_tokens, seconds, n_proposed, n_accepted, n_different) in sums.items():
        acceptance = n_accepted / n_proposed if n_proposed else None
        line = {"mode": mode, "tokens_per_s": n_tokens / seconds, "acceptance": acceptance, "tokens": n_tokens}
        print(json.dumps({**line, "different_answers": n_different}))


if __name__ == "__main__":
    main()
