"""Generation through our actor against the bare engine on the same requests: tokens per second.

    python scripts/bench_generation.py --model FOLDER

Both are vLLM with the same settings on the same prompts, seeds and limits, each in a process of its own, in turn; what
is timed begins after a first chunk. The actor's time is the driver's: from the first chunk asked for to the last group
that arrived, so what Ray, the hand-out of chunks and our records cost is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from rich.console import Console
from rich.table import Table

from own_process import measure


def make_config(task: dict[str, Any]) -> Any:
    from online_po import Config

    return Config.parse(
        {
            "run": {"name": "bench"},
            "model": {"path": task["model"]},
            "prompts": {"path": task["prompts"], "max_tokens": 128},
            "loop": {
                "rounds": 1,
                "prompts_per_round": task["prompts_of_a_chunk"],
                "responses_per_prompt": task["responses"],
            },
            "generator": {
                "temperature": 0.8,
                "max_tokens": task["max_tokens"],
                "chunk_prompts": task["prompts_of_a_chunk"],
            },
            "judge": {"kind": "rules"},
            "loss": {"name": "sigmoid"},
            "eval": {"every": 0},
        }
    )


def make_chunks(task: dict[str, Any], config: Any) -> list[list[Any]]:
    """The requests of a first chunk and of those that are timed."""
    from online_po.model_config import load_tokenizer
    from online_po.prompts import load_prompts
    from online_po.round import request

    tokenizer = load_tokenizer(config.model.path, config.model.path, None)
    prompts, _ = load_prompts(config.prompts, tokenizer, config.run.seed)
    size = task["prompts_of_a_chunk"]
    return [
        [request(config, prompts[i], "sample", 1) for i in range(n * size, (n + 1) * size)]
        for n in range(1 + task["chunks"])
    ]


def actor(task: dict[str, Any]) -> dict[str, float]:
    """Tokens and seconds of the actor."""
    from actors import cluster
    from actors.generators import GeneratorGroup

    config = make_config(task)
    first, *rest = make_chunks(task, config)
    cluster.start(config.ray)
    try:
        group = GeneratorGroup(config)
        group.ready(600)
        for _ in group.generate([(0, first)], config.generator):
            pass
        began = time.perf_counter()
        tokens = sum(
            len(response.token_ids)
            for _, groups in group.generate(list(enumerate(rest)), config.generator)
            for found in groups.values()
            for response in found.responses
        )
        seconds = time.perf_counter() - began
        group.close()
    finally:
        cluster.stop()
    return {"tokens": tokens, "seconds": seconds}


def bare(task: dict[str, Any]) -> dict[str, float]:
    """Tokens and seconds of `vllm.LLM.generate`, called for each chunk, with our engine's settings."""
    from actors.engines import environment, max_model_len

    config = make_config(task)
    os.environ.update(environment(config, os.cpu_count() or 1))
    import vllm

    from actors.vllm_engine import engine_settings, sampling_params

    settings = engine_settings(config.model.path, config.generator, max_model_len(config))
    engine = vllm.LLM(config.model.path, **settings)

    def generate(chunk: list[Any]) -> int:
        prompts = [{"prompt_token_ids": list(one.prompt.token_ids)} for one in chunk for _ in one.seeds]
        params = [sampling_params(config.generator, seed) for one in chunk for seed in one.seeds]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        return sum(len(output.outputs[0].token_ids) for output in outputs)

    first, *rest = make_chunks(task, config)
    generate(first)
    began = time.perf_counter()
    tokens = sum(generate(chunk) for chunk in rest)
    return {"tokens": tokens, "seconds": time.perf_counter() - began}


KINDS = {"bare engine": bare, "actor": actor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the model")
    parser.add_argument("--prompts", type=int, default=48, help="of a chunk (%(default)s)")
    parser.add_argument("--responses", type=int, default=4, help="to a prompt (%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=64, help="of a response (%(default)s)")
    parser.add_argument("--chunks", type=int, default=2, help="that are timed (%(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="processes of each kind (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--task", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task = json.loads(args.task.read_text())
        args.out.write_text(json.dumps(KINDS[task["kind"]](task)))
        return
    if args.model is None:
        parser.error("--model is needed: a folder that vLLM loads")
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = Path(__file__).with_name("make_prompts.py")
        subprocess.run([sys.executable, str(script), "--out", str(folder)], check=True, capture_output=True)
        task = {
            "model": str(args.model.absolute()),
            "prompts": str(folder / "train.jsonl"),
            "prompts_of_a_chunk": args.prompts,
            "responses": args.responses,
            "max_tokens": args.max_tokens,
            "chunks": args.chunks,
        }
        for repeat in range(args.repeats):
            for kind in KINDS:
                with console.status(f"{kind}, {repeat + 1} of {args.repeats}"):
                    found[kind].append(measure(__file__, task | {"kind": kind}))
    rates = {kind: statistics.median(run["tokens"] / run["seconds"] for run in runs) for kind, runs in found.items()}
    table = Table("", "tokens", "tokens/s", "share of the bare engine's")
    for kind, rate in rates.items():
        share = rate / rates["bare engine"]
        table.add_row(kind, f"{found[kind][0]['tokens']:.0f}", f"{rate:.1f}", f"{share:.1%}")
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps({"runs": found, "tokens_per_s": rates}, indent=1))


if __name__ == "__main__":
    main()
