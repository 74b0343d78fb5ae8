"""TRL's trainers as a user runs them, timed; what the benchmarks compare with. Needs TRL (extra `trl`).

Started by bench_learner.py (DPOTrainer on given pairs) and bench_online.py (OnlineDPOTrainer), each time as a process
of its own: `--task` names a JSON file of what to do, `--out` where the figures go.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.utils import logging as transformers_logging

from bench_learner import peak_gib, reset_peak
from bench_online import score
from online_po import cpu

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL's, of vLLM versions
    import trl
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer


class StepTimes(TrainerCallback):
    """When optimizer steps began and ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def adapter(mode: str) -> LoraConfig | None:
    """The same as our learner's `lora: {rank: 16}`."""
    if mode == "full":
        return None
    return LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear")


def common(folder: str, dtype: str) -> dict[str, Any]:
    """Settings of every trainer: on the CPU, nothing recomputed, nothing logged or saved."""
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": dtype == "bfloat16",
        "gradient_checkpointing": False,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": None,
        "beta": 0.1,
    }


def learn(task: dict[str, Any]) -> dict[str, Any]:
    """DPOTrainer on given pairs with given reference log-probabilities (they cost the same whatever they are)."""
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    rows = [
        {
            "prompt_ids": pair["prompt_token_ids"],
            "chosen_ids": pair["chosen_token_ids"],
            "rejected_ids": pair["rejected_token_ids"],
            "ref_chosen_logps": -50.0,
            "ref_rejected_logps": -50.0,
        }
        for pair in task["pairs"]
    ]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = trl.DPOConfig(
            **common(folder, task["dtype"]),
            per_device_train_batch_size=task["batch"],
            num_train_epochs=1,
            learning_rate=1e-6,
            precompute_ref_log_probs=True,
            train_sampling_strategy="sequential",
        )
        text = Dataset.from_list([{"prompt": "one", "chosen": " two", "rejected": " three"}] * len(rows))
        trainer = trl.DPOTrainer(
            model,
            args=args,
            train_dataset=text,
            processing_class=AutoTokenizer.from_pretrained(task["model"]),
            peft_config=adapter(task["mode"]),
            callbacks=[times],
        )
        trainer.train_dataset = Dataset.from_list(rows)
        reset_peak()
        trainer.train()
    sizes = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    tokens = [sum(sizes[i : i + task["batch"]]) for i in range(0, len(sizes), task["batch"])]
    return {"seconds": times.seconds[1:], "tokens": tokens[1:], "peak_gib": peak_gib()}


def online(task: dict[str, Any]) -> dict[str, float]:
    """OnlineDPOTrainer with the judge of bench_online.py; pairs and seconds of its steps but the first."""
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(task["model"])
    lines = Path(task["prompts"]).read_text().splitlines()
    rows = [{"prompt": [{"role": "user", "content": json.loads(line)["prompt"]}]} for line in lines]
    steps = task["steps"] + 1
    reference = None if task["mode"] == "lora" else AutoModelForCausalLM.from_pretrained(task["model"])

    def judge(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        answers = [completion[0]["content"] for completion in completions]
        return [score(prompt, answer, {}) for prompt, answer in zip(prompts, answers, strict=True)]

    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        args = OnlineDPOConfig(
            **common(folder, task["dtype"]) | {"max_length": task["prompt_tokens"] + task["max_tokens"]},
            per_device_train_batch_size=task["batch"],
            max_steps=steps,
            learning_rate=1e-6,
            max_new_tokens=task["max_tokens"],
            temperature=task["temperature"],
        )
        trainer = OnlineDPOTrainer(
            model,
            ref_model=reference,
            reward_funcs=judge,
            args=args,
            train_dataset=Dataset.from_list(rows[: steps * task["batch"]]),
            processing_class=tokenizer,
            peft_config=adapter(task["mode"]),
            callbacks=[times],
        )
        trainer.train()
    return {"pairs": task["batch"] * task["steps"], "seconds": sum(times.seconds[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    task = json.loads(args.task.read_text())
    torch.set_num_threads(task["threads"])
    if task["kind"] == "trl tuned":
        cpu.use_onednn_products()
    transformers_logging.set_verbosity_error()
    disable_progress_bars()
    args.out.write_text(json.dumps(learn(task) if "pairs" in task else online(task)))


if __name__ == "__main__":
    main()
