"""The learner on a GPU: tokens per second, share of the card's measured bfloat16 peak, peak memory, largest model.

    python scripts/bench_gpu.py                                  # all tables
    python scripts/bench_gpu.py --modes full --branches 2 --largest 0
    python scripts/bench_gpu.py --shape tiny --largest 0         # to try the script on a CPU

Needs no vLLM, no Ray and no weights: the model is of Llama's shape with random ones, the tokens are random. Optimizer
steps are timed after a first one, in bfloat16 with float32 weights (LoRA: bfloat16 ones), reference log-probabilities
there before. A prompt has k responses, which make k / 2 pairs. Floating-point operations are those that training needs
for the tokens that go through the model: 6 for each weight and token (LoRA: 4), the head's for response tokens alone,
and those of attention; what is computed again counts nothing. Each measurement is a process of its own. Shared prompts'
attention goes through FlexAttention where that passes its trial, and, to compare, piece by piece.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from online_po.gpu import VARIABLES
from own_process import MeasurementError, measure

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 1024},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256},
}
HEAD_SIZE = 64
PROMPTS = 8
"""Of an optimizer step."""
KINDS = ("plain", "shared", "shared, by pieces")


def make_model(folder: Path, shape: dict[str, int]) -> None:
    """A folder with random weights, tied embeddings, and some tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from make_tiny_model import make_tiny_tokenizer

    heads = shape["hidden_size"] // HEAD_SIZE
    config = LlamaConfig(
        **shape,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    logging.disable_progress_bar()
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    make_tiny_tokenizer().save_pretrained(folder)


def make_rows(task: dict[str, Any], vocabulary: int) -> list[dict[str, list[int]]]:
    """`PROMPTS` prompts for each step, each with `branches` responses."""
    rng, rows = np.random.default_rng(0), list[dict[str, list[int]]]()

    def tokens(count: int) -> list[int]:
        return rng.integers(4, vocabulary, count).tolist()

    for _ in range(PROMPTS * (task["steps"] + 1)):
        prompt = tokens(task["prompt_tokens"])
        for _ in range(task["branches"] // 2):
            sides = {side: tokens(task["response_tokens"]) for side in ("chosen_token_ids", "rejected_token_ids")}
            rows.append({"prompt_token_ids": prompt} | sides)
    return rows


def needed(shape: dict[str, int], task: dict[str, Any]) -> float:
    """Floating-point operations of an optimizer step, see the module."""
    hidden, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads = hidden // HEAD_SIZE
    keys = max(1, heads // 4) * HEAD_SIZE
    body = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * shape["intermediate_size"])
    prompt, response, branches = task["prompt_tokens"], task["response_tokens"], task["branches"]
    responses = branches * response
    if task["kind"] != "plain":
        tokens = prompt + responses
        pairs = prompt**2 / 2 + branches * (response * prompt + response**2 / 2)
    else:
        tokens = branches * prompt + responses
        pairs = branches * (prompt + response) ** 2 / 2
    passes = 2 if task["mode"] == "lora" else 3  # forward and backward, of which weights take one half
    products = 2 * passes * (body * tokens + hidden * shape["vocab_size"] * responses)
    return PROMPTS * (products + 3 * 4 * hidden * layers * pairs)


def matrix_peak() -> dict[str, Any]:
    """Operations a second of large bfloat16 matrix products, the most of ten, and where."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        wait()
        began = time.perf_counter()
        left @ right
        wait()
        best = min(best, time.perf_counter() - began)
    return {"flops": 2 * size**3 / best, "device": device}


def wait() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def learn(task: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the steps but the first, peak memory in GiB (on a CPU the process's), and what the learner told."""
    import pyarrow as pa
    import torch

    from bench_learner import peak_gib, reset_peak
    from online_po import gpu, prefix_sharing
    from online_po.learner import TorchLearner
    from online_po.loss_configs import LOSS_BY_NAME
    from online_po.sections import LearnerConfig, ModelConfig
    from online_po.tables import PAIR_SCHEMA

    vocabulary = json.loads((Path(task["model"]) / "config.json").read_text())["vocab_size"]
    pairs = pa.Table.from_pylist(make_rows(task, vocabulary), schema=PAIR_SCHEMA)
    lora = task["mode"] == "lora"
    config = LearnerConfig.model_validate(
        {
            "global_batch_size": PROMPTS * task["branches"] // 2,
            "examples_together": task["branches"] // 2,
            "micro_batch_tokens": task["micro_batch_tokens"],
            "compute_dtype": "bfloat16",
            "param_dtype": "bfloat16" if lora else "float32",
            "lora": {"rank": 16} if lora else None,
            "prefix_sharing": task["kind"] != "plain",
            "gradient_checkpointing": task["checkpointing"],
        }
    )
    gpu.prepare("bfloat16")
    losses = [LOSS_BY_NAME["sigmoid"]()]  # type: ignore[call-arg]
    if task["kind"] == "shared, by pieces":
        prefix_sharing.try_shapes = lambda shapes: None  # nothing is proven, then
    learner = TorchLearner(ModelConfig.model_validate({"path": task["model"]}), config, losses, seed=0, rounds=1)
    reference = {side: np.zeros(len(pairs), dtype=np.float32) for side in ("chosen", "rejected")}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()
    steps = list(learner.update(1, pairs, reference, None))
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else peak_gib()
    found = {"seconds": float(np.median([step["seconds"] for step in steps[1:]])), "peak_gib": peak}
    told = {"told": learner.sharing.told if task["kind"] == "shared" else []}
    return told | found | {"micro_batch_tokens": steps[-1].get("micro_batch_tokens", float(task["micro_batch_tokens"]))}


def largest(base: dict[str, int], mode: str, task: dict[str, Any], tries: int, console: Console) -> int:
    """Weights of the largest model (more layers, and wider) that a step with gradient checkpointing holds."""
    held = 0
    for power in range(tries):
        shape = base | {
            "hidden_size": base["hidden_size"] * (1 + power // 2),
            "intermediate_size": base["intermediate_size"] * (1 + power // 2),
            "num_hidden_layers": base["num_hidden_layers"] * (1 + (power + 1) // 2),
        }
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_model(folder / "model", shape)
            size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors")) // 2
            own = {"model": str(folder / "model"), "mode": mode, "checkpointing": True, "branches": 2, "steps": 1}
            try:
                found = measure(__file__, task | own, variables=VARIABLES)
            except MeasurementError as error:
                console.print(f"{mode}: {size / 1e9:.3g} billion weights are too many: {error}", markup=False)
                break
        console.print(f"{mode}: {size / 1e9:.3g} billion weights, peak {found['peak_gib']:.1f} GiB")
        held = size
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="1b", help="(%(default)s)")
    parser.add_argument("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--branches", nargs="+", type=int, default=[2, 4, 8], help="responses to a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--response-tokens", type=int, default=1024, help="(%(default)s)")
    parser.add_argument("--micro-batch-tokens", type=int, default=16384, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps (%(default)s)")
    parser.add_argument("--largest", type=int, default=8, help="sizes to try for the largest model (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task = json.loads(args.task.read_text())
        args.out.write_text(json.dumps(learn(task) if task else matrix_peak()))
        return
    if odd := [k for k in args.branches if k < 2 or k % 2]:
        parser.error(f"--branches: {odd[0]} responses make no whole pairs; give even numbers")
    shape, console = SHAPES[args.shape], Console()
    measured = measure(__file__, {})
    peak, kinds = measured["flops"], KINDS if measured["device"] == "cuda" else KINDS[:2]
    console.print(f"bfloat16 matrix products: {peak / 1e12:.2f} TFLOP/s")
    figures: dict[str, Any] = {"peak_flops": peak, "learner": [], "largest": {}}
    table = Table("mode", "k", "", "response tokens/s", "speed", "of the peak", "peak, GiB")
    task = {
        "prompt_tokens": args.prompt_tokens,
        "response_tokens": args.response_tokens,
        "micro_batch_tokens": args.micro_batch_tokens,
        "steps": args.steps,
        "checkpointing": False,
        "kind": "shared",
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", shape)
        task["model"] = str(folder / "model")
        cases = [(mode, k) for mode in args.modes for k in args.branches]
        for mode, k in track(cases, "measuring", console=console):
            plain = None
            for kind in kinds:
                own = task | {"mode": mode, "branches": k, "kind": kind}
                try:
                    found = measure(__file__, own, variables=VARIABLES)
                except MeasurementError as error:
                    console.print(f"{mode}, k = {k}, {kind}: {error}", markup=False)
                    continue
                for text in found.pop("told"):
                    console.print(f"{mode}, k = {k}, {kind}: {text}", markup=False)
                rate = PROMPTS * k * args.response_tokens / found["seconds"]
                share = needed(shape, own) / found["seconds"] / peak
                row = {"mode": mode, "k": k, "kind": kind, "tokens_per_s": rate, "of_peak": share, **found}
                figures["learner"].append(row)
                if kind == "plain":
                    plain = rate
                speed = f"{rate / plain:.2f}x" if plain is not None else ""
                cells = (mode, str(k), kind, f"{rate:.1f}", speed, f"{share:.1%}")
                table.add_row(*cells, f"{found['peak_gib']:.2f}", end_section=kind == kinds[-1])
    console.print(table)
    for mode in args.modes if args.largest else []:
        figures["largest"][mode] = largest(shape, mode, task, args.largest, console)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
