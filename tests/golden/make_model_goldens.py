"""Makes the golden data in models/ with llama.cpp, an implementation that shares no code with Paceline.

Each checkpoint is dequantized to a float32 file first, so that the reference rounds neither weights nor activations;
that the reference really computes in float32 is checked against a plain float64 forward pass before anything is written.
It does not make the tokenizer goldens.  See README.md for the formats.
"""

import argparse
import ctypes
import hashlib
import json
import math
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

# OpenMP reads this when llama.cpp is loaded: threads that spin make a busy machine four times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import gguf
import jinja2.sandbox
import llama_cpp.llama_cpp as llama
import numpy as np

MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct")
FOLDER = Path(__file__).parent / "models"
N_CONTINUATION = 48
N_TEXT = 2000
N_BATCH = 256
POSITION_STEP = 10
N_SAMPLED_VOCABULARY = 1024
N_CHECKED = 128
CHECK_TOLERANCE = 5e-3
CLEAR_MARGIN = 0.1

# llama.cpp logs every graph it builds; kept alive here because C holds the pointer.
SILENT = llama.llama_log_callback(lambda _level, _text, _user_data: None)


# --- the float32 checkpoint ---------------------------------------------------------------------------------------


def write_float32(source: gguf.GGUFReader, target: Path) -> None:
    """Copies a checkpoint with every tensor dequantized and every metadata value but the file type unchanged."""
    architecture = source.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, architecture)
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        value = field.contents()
        if field.name == "general.file_type":
            value = int(gguf.LlamaFileType.ALL_F32)
        sub_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, value, field.types[0], sub_type)
    for tensor in source.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), 4 * math.prod(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in source.tensors:
        writer.write_tensor_data(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.close()


# --- llama.cpp ----------------------------------------------------------------------------------------------------


class Model:
    """One llama.cpp model and context."""

    def __init__(self, path: Path, n_threads: int, **context: int) -> None:
        self.model = llama.llama_model_load_from_file(str(path).encode(), llama.llama_model_default_params())
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = 2048
        parameters.n_batch = parameters.n_ubatch = N_BATCH
        parameters.n_threads = parameters.n_threads_batch = n_threads
        for name, value in context.items():
            setattr(parameters, name, value)
        self.context = llama.llama_init_from_model(self.model, parameters)
        if not self.model or not self.context:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        self.vocabulary = llama.llama_model_get_vocab(self.model)
        self.n_vocab = llama.llama_vocab_n_tokens(self.vocabulary)
        self.adds_bos = bool(llama.llama_vocab_get_add_bos(self.vocabulary))
        self.batch = llama.llama_batch_init(N_BATCH, 0, 1)
        self.n_past = 0

    def close(self) -> None:
        llama.llama_batch_free(self.batch)
        llama.llama_free(self.context)
        llama.llama_model_free(self.model)

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text; special tokens written in it count as such, BOS is added if the checkpoint says so."""
        data = text.encode()
        ids = (llama.llama_token * (len(data) + 8))()
        n_ids = llama.llama_tokenize(self.vocabulary, data, len(data), ids, len(ids), True, True)
        return list(ids[:n_ids])

    def piece(self, token: int) -> str:
        """The text of one token, also of a special one."""
        data = ctypes.create_string_buffer(256)
        n_bytes = llama.llama_token_to_piece(self.vocabulary, token, data, len(data), 0, True)
        return data.raw[:n_bytes].decode()

    def ends(self, token: int) -> bool:
        return bool(llama.llama_vocab_is_eog(self.vocabulary, token))

    def reset(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        self.n_past = 0

    def forward(self, ids: list[int]) -> np.ndarray:
        """Appends at most N_BATCH tokens and returns their logits [n_tokens, n_vocab]."""
        self.batch.n_tokens = len(ids)
        for row, token in enumerate(ids):
            self.batch.token[row] = token
            self.batch.pos[row] = self.n_past + row
            self.batch.n_seq_id[row] = 1
            self.batch.seq_id[row][0] = 0
            self.batch.logits[row] = 1
        status = llama.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answered {status} at position {self.n_past}")
        self.n_past += len(ids)
        logits = llama.llama_get_logits(self.context)
        return np.ctypeslib.as_array(logits, shape=(len(ids), self.n_vocab)).copy()

    def chunks(self, ids: list[int]):
        """Runs a whole sequence from an empty cache; yields (first position, logits) of each chunk."""
        self.reset()
        for start in range(0, len(ids), N_BATCH):
            yield start, self.forward(ids[start : start + N_BATCH])


def reference(path: Path, n_threads: int) -> Model:
    """A context in which nothing is rounded below float32: float32 KV cache, no fused attention."""
    return Model(
        path,
        n_threads,
        type_k=llama.GGML_TYPE_F32,
        type_v=llama.GGML_TYPE_F32,
        flash_attn_type=llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    )


# --- a second opinion in float64 ----------------------------------------------------------------------------------


class Float64:
    """The plainest decoder forward pass, for architectures llama and qwen2; reads the float32 checkpoint."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.tensors = {t.name: t.data.reshape([int(n) for n in reversed(t.shape)]) for t in reader.tensors}
        self.architecture = reader.fields["general.architecture"].contents()
        value = lambda key: reader.fields[f"{self.architecture}.{key}"].contents()
        self.n_layers = value("block_count")
        self.n_heads = value("attention.head_count")
        self.n_kv_heads = value("attention.head_count_kv")
        self.eps = value("attention.layer_norm_rms_epsilon")
        self.freq_base = value("rope.freq_base")

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        weight = self.tensors[f"{name}.weight"]
        parts = [x @ weight[row : row + 8192].astype(np.float64).T for row in range(0, len(weight), 8192)]
        return np.concatenate(parts, axis=1) + self.tensors.get(f"{name}.bias", 0.0)

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        scale = 1.0 / np.sqrt((x * x).mean(axis=1, keepdims=True) + self.eps)
        return x * scale * self.tensors[f"{name}.weight"]

    def rotate(self, heads: np.ndarray) -> np.ndarray:  # [n_tokens, n_heads, head_dim]
        half = heads.shape[2] // 2
        angles = np.arange(len(heads))[:, None] * self.freq_base ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        if self.architecture == "llama":
            first, second = slice(0, None, 2), slice(1, None, 2)
        else:
            first, second = slice(0, half), slice(half, None)
        a, b = heads[:, :, first], heads[:, :, second]
        rotated = np.empty_like(heads)
        rotated[:, :, first], rotated[:, :, second] = a * cos - b * sin, a * sin + b * cos
        return rotated

    def attention(self, x: np.ndarray, layer: str) -> np.ndarray:
        n_tokens = len(x)
        q = self.rotate(self.linear(x, f"{layer}.attn_q").reshape(n_tokens, self.n_heads, -1))
        k = self.rotate(self.linear(x, f"{layer}.attn_k").reshape(n_tokens, self.n_kv_heads, -1))
        v = self.linear(x, f"{layer}.attn_v").reshape(n_tokens, self.n_kv_heads, -1)
        mixed = np.empty_like(q)
        hidden = np.triu(np.full((n_tokens, n_tokens), -np.inf), 1)
        for head in range(self.n_heads):
            kv_head = head * self.n_kv_heads // self.n_heads
            scores = q[:, head] @ k[:, kv_head].T / math.sqrt(q.shape[2]) + hidden
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            mixed[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, kv_head]
        return self.linear(mixed.reshape(n_tokens, -1), f"{layer}.attn_output")

    def forward(self, ids: list[int]) -> np.ndarray:
        x = self.tensors["token_embd.weight"][ids].astype(np.float64)
        for layer in (f"blk.{idx}" for idx in range(self.n_layers)):
            x = x + self.attention(self.norm(x, f"{layer}.attn_norm"), layer)
            normed = self.norm(x, f"{layer}.ffn_norm")
            gate = self.linear(normed, f"{layer}.ffn_gate")
            up = self.linear(normed, f"{layer}.ffn_up")
            x = x + self.linear(gate / (1.0 + np.exp(-gate)) * up, f"{layer}.ffn_down")
        head = "output" if "output.weight" in self.tensors else "token_embd"
        return self.linear(self.norm(x, "output_norm"), head)


def check_against_float64(model: Model, path: Path, ids: list[int]) -> float:
    """Largest difference of a logit from the float64 forward pass; refuses a reference that is not float32."""
    ids = ids[:N_CHECKED]
    expected = Float64(path).forward(ids)
    difference = max(float(np.abs(logits - expected[start : start + N_BATCH]).max()) for start, logits in model.chunks(ids))
    if difference > CHECK_TOLERANCE:
        raise RuntimeError(f"a logit differs by {difference} from float64, more than {CHECK_TOLERANCE}")
    return difference


# --- continuations ------------------------------------------------------------------------------------------------


def prompt_text(prompt: dict, template: str, model: Model, special: dict[str, int]) -> str:
    """The text a prompt of prompts.json stands for."""
    if "file" in prompt:
        return (FOLDER / prompt["file"]).read_text().rstrip("\n")
    if "text" in prompt:
        return prompt["text"]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    names = {name: model.piece(token) for name, token in special.items()}
    return environment.from_string(template).render(messages=prompt["messages"], add_generation_prompt=True, **names)


def continuation(model: Model, prompt_ids: list[int]) -> dict:
    """Greedy tokens after a prompt, past the end of generation, with how clear each choice was."""
    for _, logits in model.chunks(prompt_ids):
        row = logits[-1]
    steps: dict[str, list] = {"ids": [], "second": [], "margin": []}
    while True:
        second, first = (int(token) for token in np.argsort(row, kind="stable")[-2:])
        if row[first] == row[second]:
            raise RuntimeError(f"exact tie between {first} and {second}")
        steps["ids"].append(first)
        steps["second"].append(second)
        steps["margin"].append(round(float(row[first] - row[second]), 4))
        if len(steps["ids"]) == N_CONTINUATION:
            break
        row = model.forward([first])[0]
    steps["n_until_end"] = next((n for n, token in enumerate(steps["ids"], 1) if model.ends(token)), None)
    return steps


def continuations(model: Model, source: gguf.GGUFReader) -> list[dict]:
    """Every prompt of prompts.json with its continuation."""
    template = source.fields["tokenizer.chat_template"].contents()
    special = {
        name: source.fields[f"tokenizer.ggml.{name}_id"].contents()
        for name in ("bos_token", "eos_token")
    }
    rows = []
    for prompt in json.loads((FOLDER / "prompts.json").read_text()):
        text = prompt_text(prompt, template, model, special)
        prompt_ids = model.tokenize(text)
        row = {"name": prompt["name"], "messages": prompt.get("messages"), "prompt": text, "prompt_ids": prompt_ids}
        rows.append(row | continuation(model, prompt_ids))
    return rows


# --- the text -----------------------------------------------------------------------------------------------------


def sampled_vocabulary(n_vocab: int) -> np.ndarray:
    return np.arange(N_SAMPLED_VOCABULARY) * (n_vocab // N_SAMPLED_VOCABULARY)


def text_figures(model: Model, ids: list[int]) -> dict[str, np.ndarray]:
    """Per position top1, margin, logprob of the next token (one fewer); per sampled position some logits."""
    parts: dict[str, list] = {"top1": [], "margin": [], "logprob": [], "logits": []}
    for start, logits in model.chunks(ids):
        best = np.partition(logits, -2, axis=1)[:, -2:]
        parts["top1"].append(logits.argmax(axis=1))
        parts["margin"].append(best[:, 1] - best[:, 0])
        following = ids[start + 1 : start + 1 + len(logits)]
        for row, token in zip(logits.astype(np.float64), following):
            log_sum = row.max() + math.log(np.exp(row - row.max()).sum())
            parts["logprob"].append([row[token] - log_sum])
        rows = [row for row in range(len(logits)) if (start + row) % POSITION_STEP == 0]
        parts["logits"].append(logits[rows][:, sampled_vocabulary(model.n_vocab)])
    return {name: np.concatenate(values) for name, values in parts.items()}


def perplexity(figures: dict[str, np.ndarray]) -> float:
    return math.exp(-figures["logprob"].mean())


def compare(figures: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict:
    """How far one run over the text is from another."""
    a, b = figures["logits"].astype(np.float64), expected["logits"].astype(np.float64)
    cosine = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    differs = figures["top1"] != expected["top1"]
    clear = expected["margin"] >= CLEAR_MARGIN
    return {
        "top1_agreement": round(float(1.0 - differs.mean()), 4),
        "top1_agreement_where_clear": round(float(1.0 - differs[clear].mean()), 4),
        "largest_margin_of_a_different_top1": round(float(expected["margin"][differs].max(initial=0.0)), 4),
        "cosine_mean": round(float(cosine.mean()), 6),
        "cosine_min": round(float(cosine.min()), 6),
        "cosine_at_least_0.999": round(float((cosine >= 0.999).mean()), 4),
        "perplexity": round(perplexity(figures), 4),
        "perplexity_change": round(perplexity(figures) / perplexity(expected) - 1.0, 6),
    }


# --- files --------------------------------------------------------------------------------------------------------


def compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def write_lines(path: Path, head: dict, lists: dict[str, list], per_line: int) -> None:
    """Writes one JSON object: a line for each value of the head, then lists with `per_line` elements a line."""
    lines = [f"{compact(name)}:{compact(value)}" for name, value in head.items()]
    for name, values in lists.items():
        pieces = [compact(values[at : at + per_line])[1:-1] for at in range(0, len(values), per_line)]
        lines.append(f"{compact(name)}:[\n" + ",\n".join(pieces) + "\n]")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def write_text(name: str, head: dict, ids: list[int], figures: dict[str, np.ndarray], n_vocab: int) -> None:
    rounded = lambda values, digits: [round(float(value), digits) for value in values]
    lists = {
        "ids": ids,
        "top1": figures["top1"].tolist(),
        "margin": rounded(figures["margin"], 4),
        "logprob": rounded(figures["logprob"], 6),
    }
    head = head | {"text": "text.txt", "n_tokens": len(ids), "perplexity": round(perplexity(figures), 6)}
    write_lines(FOLDER / f"{name}.text.json", head, lists, 20)
    logits = figures["logits"].astype("<f2")
    (FOLDER / f"{name}.logits.f16").write_bytes(logits.tobytes())
    shape = {
        "shape": list(logits.shape),
        "type": "f16, little endian, row-major [n_positions, n_sampled]",
        "position_step": POSITION_STEP,
        "token_step": n_vocab // N_SAMPLED_VOCABULARY,
        "n_vocab": n_vocab,
    }
    write_lines(FOLDER / f"{name}.logits.json", {"model": name} | shape, {}, 1)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- one model ----------------------------------------------------------------------------------------------------


def make_reference(name: str, path: Path, float32: Path, n_threads: int) -> tuple[list[int], dict, dict]:
    """Writes the goldens of one model; returns the text's ids, its figures and a summary."""
    source = gguf.GGUFReader(path)
    write_float32(source, float32)
    model = reference(float32, n_threads)
    ids = model.tokenize((FOLDER / "text.txt").read_text())[:N_TEXT]
    if len(ids) != N_TEXT:
        raise RuntimeError(f"text.txt has {len(ids)} tokens for {name}, {N_TEXT} are needed")
    difference = check_against_float64(model, float32, ids)
    head = {
        "model": name,
        "sha256": sha256(path),
        "reference": f"llama-cpp-python {version('llama_cpp_python')}, float32 weights, activations and KV cache",
        "add_bos": model.adds_bos,
    }
    rows = continuations(model, source)
    write_lines(FOLDER / f"{name}.continuations.json", head, {"prompts": rows}, 1)
    figures = text_figures(model, ids)
    write_text(name, head, ids, figures, model.n_vocab)
    model.close()
    margins = np.array([margin for row in rows for margin in row["margin"]])
    summary = {
        "largest_difference_from_float64": round(difference, 6),
        "text_clear_positions": int((figures["margin"] >= CLEAR_MARGIN).sum()),
        "continuation_steps": len(margins),
        "continuation_clear_steps": int((margins >= CLEAR_MARGIN).sum()),
        "perplexity": round(perplexity(figures), 4),
    }
    return ids, figures, summary


def make(name: str, path: Path, n_threads: int) -> dict:
    """Writes the goldens of one model and measures what llama.cpp's own quantized arithmetic does to them."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ids, expected, summary = make_reference(name, path, Path(folder) / "float32.gguf", n_threads)
    plain = Model(path, n_threads)
    summary["quantized_llama_cpp"] = compare(text_figures(plain, ids), expected)
    plain.close()
    print(f"{name}: {time.monotonic() - started:.0f} s, {json.dumps(summary, indent=2)}", flush=True)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path, help="folder with the checkpoints, named NAME.gguf")
    parser.add_argument("--only", choices=MODELS, action="append", help="make these models only")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    llama.llama_log_set(SILENT, ctypes.c_void_p(0))
    path = FOLDER / "figures.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    for name in arguments.only or MODELS:
        figures[name] = make(name, arguments.models / f"{name}.gguf", arguments.threads)
        write_lines(path, {model: figures[model] for model in MODELS if model in figures}, {}, 1)


if __name__ == "__main__":
    main()
