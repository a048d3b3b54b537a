"""Makes the golden data of the tokenizer and chat-template tests with implementations that are not ours.

    python3 -m venv venv
    venv/bin/pip install llama-cpp-python==0.3.36 gguf==0.19.0 tokenizers==0.23.3 transformers==5.23.0 jinja2==3.1.6
    venv/bin/python tests/golden/make_tokenizer_goldens.py MODELS_DIR

MODELS_DIR holds smollm2-135m-instruct.gguf, qwen2.5-coder-0.5b-instruct.gguf and qwen2.5-coder-1.5b-instruct.gguf.
Everything is written to tests/golden/tokenizer/:

* texts.json                   the strings, those of tokenizer_corpus.py and random mixtures of their pieces
* smollm2-135m-instruct.json   ids by llama.cpp for each string; `parse` recognises control tokens in the text,
                               `literal` (given where it differs) does not
* qwen2.5-coder.json           the same; the script checks that both Qwen files have one tokenizer
* smollm2-pre-*.json           the vocabulary of SmolLM2 with the splitting rule of another family
* sentencepiece.json           a small SentencePiece vocabulary made here, and its ids
* chat_templates.json          chat templates and what transformers' renderer makes of them
"""

import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import tokenizers
from transformers.utils import chat_template_utils

import tokenizer_corpus
import template_cases

OUT = Path(__file__).parent / "tokenizer"
PRE_VARIANTS = ["qwen2", "llama-bpe", "gpt-2", "default"]
N_RANDOM = 120


def write(name, value):
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    (OUT / name).write_text(text + "\n")
    print(f"{name}: {len(text)} bytes")


def random_texts():
    """Strings glued from pieces of the corpus, so that every kind of border occurs."""
    rng = random.Random(20261123)
    texts = []
    while len(texts) < N_RANDOM:
        parts = []
        for _ in range(rng.randint(2, 7)):
            source = rng.choice(tokenizer_corpus.TEXTS)
            start = rng.randint(0, len(source))
            parts.append(source[start : start + rng.randint(1, 12)])
        texts.append("".join(parts))
    return texts


def ids_by_llama_cpp(path, texts):
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    cases = []
    for text in texts:
        data = text.encode()
        parse = model.tokenize(data, add_bos=False, special=True)
        literal = model.tokenize(data, add_bos=False, special=False)
        cases.append({"parse": parse} if parse == literal else {"parse": parse, "literal": literal})
    return cases


def metadata(path):
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tokenizer_digest(path):
    fields = {k: v for k, v in metadata(path).items() if k.startswith("tokenizer.") and k != "tokenizer.chat_template"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def golden(path, texts, name):
    write(f"{name}.json", {
        "reference": f"llama-cpp-python {llama_cpp.__version__}",
        "tokenizer_sha256": tokenizer_digest(path),
        "cases": ids_by_llama_cpp(path, texts),
    })


def write_vocabulary(path, fields):
    """A GGUF file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("vocabulary")
    for key, value in fields.items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array}
        add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def pre_variants(smollm2, texts, folder):
    fields = {k: v for k, v in metadata(smollm2).items() if k.startswith("tokenizer.ggml.")}
    for pre in PRE_VARIANTS:
        path = folder / f"{pre}.gguf"
        write_vocabulary(path, fields | {"tokenizer.ggml.pre": pre})
        golden(path, texts, f"smollm2-pre-{pre}")


def sentencepiece_vocabulary():
    """A vocabulary in the manner of Llama 2, learnt from the corpus: control tokens, bytes, pieces, characters,
    with a user-defined token and runs of equal scores, so that ties are decided by position alone."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=2000, min_frequency=2, show_progress=False)
    texts = [text for text in tokenizer_corpus.PROSE + tokenizer_corpus.CODE + tokenizer_corpus.SCRIPTS]
    texts += [text.replace(" ", "  ") for text in tokenizer_corpus.PROSE]
    model.train_from_iterator(texts * 3, trainer)
    pieces = [piece for piece, _ in sorted(model.get_vocab().items(), key=lambda item: item[1])]
    characters = [piece for piece in pieces if len(piece) == 1 and piece not in "\n~^"]
    merged = [piece for piece in pieces if len(piece) > 1]
    rows = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    rows += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    rows += [("<|user|>", 0.0, 4), ("[INST]", 0.0, 3)]
    rows += [(piece, -float(rank // 3), 1) for rank, piece in enumerate(merged)]
    rows += [(piece, -1e6 - rank, 1) for rank, piece in enumerate(characters)]
    tokens, scores, types = (list(column) for column in zip(*rows))
    return {"tokens": tokens, "scores": scores, "types": types}


def sentencepiece(texts, folder):
    vocabulary = sentencepiece_vocabulary()
    texts = [text.replace("<|im_start|>", "<|user|>").replace("<|im_end|>", "</s>") for text in texts]
    result = {"reference": f"llama-cpp-python {llama_cpp.__version__}", **vocabulary, "texts": texts}
    for prefix in [True, False]:
        path = folder / "spm.gguf"
        write_vocabulary(path, {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": vocabulary["tokens"],
            "tokenizer.ggml.scores": vocabulary["scores"],
            "tokenizer.ggml.token_type": vocabulary["types"],
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": prefix,
        })
        result["cases" if prefix else "cases_without_prefix"] = ids_by_llama_cpp(path, texts)
    write("sentencepiece.json", result)


def render(template, messages, add_generation_prompt, variables):
    """The text, or the message of raise_exception."""
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            conversations=[messages], chat_template=template, add_generation_prompt=add_generation_prompt, **variables)
        return {"text": texts[0]}
    except Exception as error:  # whatever the template does wrong is part of the data
        return {"error": str(error)}


def chat_templates(models):
    templates = {name: metadata(path)["tokenizer.chat_template"] for name, path in models.items()}
    templates |= template_cases.TEMPLATES
    renders = []
    for name, template in templates.items():
        for conversation_idx, messages in enumerate(template_cases.CONVERSATIONS):
            for generation_prompt in [False, True]:
                result = render(template, messages, generation_prompt, template_cases.VARIABLES)
                renders.append({"template": name, "conversation": conversation_idx,
                                "add_generation_prompt": generation_prompt, **result})
    write("chat_templates.json", {
        "templates": templates, "conversations": template_cases.CONVERSATIONS,
        "variables": template_cases.VARIABLES, "renders": renders,
    })


def main():
    models = Path(sys.argv[1])
    smollm2 = models / "smollm2-135m-instruct.gguf"
    qwens = [models / f"qwen2.5-coder-{size}-instruct.gguf" for size in ["0.5b", "1.5b"]]
    assert tokenizer_digest(qwens[0]) == tokenizer_digest(qwens[1]), "the two Qwen files differ in their tokenizer"
    texts = tokenizer_corpus.TEXTS + random_texts()
    OUT.mkdir(exist_ok=True)
    write("texts.json", texts)
    golden(smollm2, texts, "smollm2-135m-instruct")
    golden(qwens[0], texts, "qwen2.5-coder")
    with tempfile.TemporaryDirectory() as folder:
        pre_variants(smollm2, texts, Path(folder))
        sentencepiece(texts, Path(folder))
    chat_templates({"smollm2": smollm2, "qwen2.5-0.5b": qwens[0], "qwen2.5-1.5b": qwens[1]})


main()
