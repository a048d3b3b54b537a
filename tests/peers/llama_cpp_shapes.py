"""Runs one shape of work with llama.cpp through the low-level API of llama-cpp-python and prints tokens/s. It does
what `paceline bench` does for the same shape: greedy choice after each pass, logits only where they are needed, a
warm-up pass before the clock starts, loading not counted."""

import argparse
import ctypes
import json
import re
import time

import llama_cpp as llama
import numpy as np

PASS_ROWS = 512
PROMPT_TOKENS = 16
WARM_UP_STEPS = 2


def parse_shape(text):
    """(kind, tokens of each sequence, sequences)"""
    match = re.fullmatch(r"pp(\d+)|tg(\d+)(?:x(\d+))?", text)
    if not match:
        raise SystemExit(f"`{text}` is no shape")
    if match[1]:
        return "prefill", int(match[1]), 1
    return "decode", int(match[2]), int(match[3] or 1)


class Engine:
    """A model and a context with room for the shape."""

    def __init__(self, arguments, n_positions, n_sequences):
        llama.llama_backend_init()
        model_params = llama.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = not arguments.no_repack
        self.model = llama.llama_model_load_from_file(arguments.model.encode(), model_params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {arguments.model}")
        params = llama.llama_context_default_params()
        # The context is shared out evenly among the sequences.
        params.n_ctx = n_sequences * (-(-(n_positions + 1) // 256) * 256)
        params.n_batch = max(PASS_ROWS, n_sequences)
        params.n_ubatch = PASS_ROWS
        params.n_seq_max = n_sequences
        params.n_threads = arguments.threads
        params.n_threads_batch = arguments.threads
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        self.n_vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self.model))
        self.batch = llama.llama_batch_init(params.n_batch, 0, 1)

    def clear(self):
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)

    def step(self, rows):
        """Runs (token, position, sequence, wants logits) rows; the best token of each row with logits."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, output) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = output
        code = llama.llama_decode(self.context, batch)
        if code != 0:
            raise SystemExit(f"llama_decode answers {code}")
        best = []
        for i, row in enumerate(rows):
            if row[3]:
                pointer = llama.llama_get_logits_ith(self.context, i)
                floats = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float))
                best.append(int(np.argmax(np.ctypeslib.as_array(floats, shape=(self.n_vocab,)))))
        llama.llama_synchronize(self.context)
        return best

    def prefill(self, n_tokens, n_sequences):
        """Prompts one after the other; the first token of each sequence."""
        first = []
        for sequence in range(n_sequences):
            for start in range(0, n_tokens, PASS_ROWS):
                end = min(n_tokens, start + PASS_ROWS)
                token = lambda position: (7 * position + 13 * sequence + 1000) % self.n_vocab
                rows = [(token(i), i, sequence, i == n_tokens - 1) for i in range(start, end)]
                first += self.step(rows)
        return first

    def decode(self, tokens, n_steps):
        for position in range(PROMPT_TOKENS, PROMPT_TOKENS + n_steps):
            tokens = self.step([(token, position, i, True) for i, token in enumerate(tokens)])

    def seconds(self, kind, n_tokens, n_sequences):
        """Time of the shape, prompts of sequences that decode not counted."""
        self.clear()
        tokens = self.prefill(PROMPT_TOKENS, n_sequences) if kind == "decode" else None
        started = time.perf_counter()
        if kind == "decode":
            self.decode(tokens, n_tokens)
        else:
            self.prefill(n_tokens, 1)
        return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--shape", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--no-repack", action="store_true", help="keep weights as they are in the file")
    arguments = parser.parse_args()
    kind, n_tokens, n_sequences = parse_shape(arguments.shape)
    n_positions = n_tokens + (PROMPT_TOKENS if kind == "decode" else 0)
    engine = Engine(arguments, n_positions, n_sequences)
    engine.seconds(kind, min(n_tokens, WARM_UP_STEPS) if kind == "decode" else n_tokens, n_sequences)
    seconds = engine.seconds(kind, n_tokens, n_sequences)
    print(json.dumps({"tokens_per_s": n_tokens * n_sequences / seconds}))


if __name__ == "__main__":
    main()
