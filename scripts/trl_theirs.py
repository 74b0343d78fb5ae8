"""Loss and gradient norm of TRL's own trainers on token ids handed in. The only importer of trl (extra `trl`).

Every trainer is built as a user builds it, on a made-up data set of one text; the batch then goes through the
trainer's own collator and its own loss, so what is measured is TRL's code from padding to the mean over the batch.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL's, of vLLM versions that nothing here uses
    import trl
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    from trl.experimental.tpo import TPOConfig, TPOTrainer

VERSION: str = trl.__version__
CONFIGS: dict[str, Any] = {
    "DPO": trl.DPOConfig,
    "KTO": trl.KTOConfig,
    "CPO": CPOConfig,
    "ORPO": ORPOConfig,
    "TPO": TPOConfig,
    "OnlineDPO": OnlineDPOConfig,
}
LOSS_CODE = {
    "DPO": trl.DPOTrainer._compute_loss,
    "KTO": trl.KTOTrainer._compute_loss,
    "CPO": CPOTrainer.cpo_loss,
    "TPO": TPOTrainer._compute_loss,
    "OnlineDPO": OnlineDPOTrainer.training_step,
}
"""Where a trainer tells its loss types apart."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One pair as token ids."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def loss_types() -> set[tuple[str, str]]:
    """(trainer, loss type) of all that the installed TRL tells apart, read from its source; ORPO has but one."""
    found = {("ORPO", "")}
    for trainer, function in LOSS_CODE.items():
        found |= {(trainer, name) for name in re.findall(r'loss_type == "([\w-]+)"', inspect.getsource(function))}
    return found


def default(trainer: str, option: str) -> Any:
    """What an option of a trainer is where the user does not say."""
    (field,) = [f for f in dataclasses.fields(CONFIGS[trainer]) if f.name == option]
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def loss_and_grad_norm(
    trainer: str, settings: dict[str, Any], examples: Sequence[Example], policy: Path, reference: Path, one_by_one: bool
) -> tuple[float, float]:
    """(loss, L2 norm of its gradient over all parameters), in float32 on the CPU.

    one_by_one: each pair is a batch of its own, and the mean of their losses is taken, as gradient accumulation does.
    """
    transformers_logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _build(trainer, settings, policy, reference, folder, len(examples))
        made.model.train()
        made.model.zero_grad()
        batches = [[example] for example in examples] if one_by_one else [list(examples)]
        total = 0.0
        for batch in batches:
            loss = _loss(trainer, made, batch) / len(batches)
            if trainer != "OnlineDPO":  # whose loss is inside a step that has gone backward already
                loss.backward()
            total += loss.item()
        return total, _grad_norm(made.model)


def _grad_norm(model: nn.Module) -> float:
    squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item()


def _build(trainer: str, settings: dict[str, Any], policy: Path, reference: Path, folder: str, size: int) -> Any:
    model, ref_model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (policy, reference))
    args = CONFIGS[trainer](
        output_dir=folder,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_length=512,
        per_device_train_batch_size=2 * size if trainer == "KTO" else size,
        **({"train_sampling_strategy": "sequential"} if trainer == "KTO" else {}),
        **settings,
    )
    row: dict[str, Any] = {"prompt": "one", "chosen": " two", "rejected": " three"}
    if trainer == "KTO":
        row = {"prompt": "one", "completion": " two", "label": True}
    elif trainer == "TPO":
        row["reference"] = " two"
    data = Dataset.from_list([row] * 2)
    common = {"model": model, "args": args, "train_dataset": data}
    common["processing_class"] = AutoTokenizer.from_pretrained(policy)
    match trainer:
        case "DPO":
            return trl.DPOTrainer(ref_model=ref_model, **common)
        case "KTO":
            return trl.KTOTrainer(ref_model=ref_model, **common)
        case "CPO":
            return CPOTrainer(**common)
        case "ORPO":
            return ORPOTrainer(**common)
        case "TPO":
            return TPOTrainer(**common)
        case "OnlineDPO":
            return GivenResponses(ref_model=ref_model, reward_funcs=[first_half_wins], **common)
    raise AssertionError(trainer)


def _loss(trainer: str, made: Any, examples: list[Example]) -> Tensor:
    if trainer == "OnlineDPO":
        made.given = examples
        return made.training_step(made.model, {"prompt": ["" for _ in examples]})
    if trainer in ("CPO", "ORPO"):
        rows = [_with_labels(example) for example in examples]
    elif trainer == "KTO":
        rows = _singles(examples)
    else:
        rows = [{"prompt_ids": e.prompt, "chosen_ids": e.chosen, "rejected_ids": e.rejected} for e in examples]
        if trainer == "TPO":  # the gold response of a triple; pairs have none, so it is the chosen one
            rows = [row | {"reference_ids": row["chosen_ids"]} for row in rows]
    return made.compute_loss(made.model, made.data_collator(rows))


def _with_labels(example: Example) -> dict[str, list[int]]:
    row: dict[str, list[int]] = {}
    for side, response in (("chosen", example.chosen), ("rejected", example.rejected)):
        row[f"{side}_input_ids"] = example.prompt + response
        row[f"{side}_attention_mask"] = [1] * (len(example.prompt) + len(response))
        row[f"{side}_labels"] = [-100] * len(example.prompt) + response
    return row


def _singles(examples: list[Example]) -> list[dict[str, Any]]:
    """All chosen responses, then all rejected ones; responses for the KL are the batch's, one row on, as in
    KTOTrainer._prepare_dataset."""
    rows = [(e.prompt, e.chosen, True) for e in examples] + [(e.prompt, e.rejected, False) for e in examples]
    return [
        {"prompt_ids": prompt, "completion_ids": response, "KL_completion_ids": rows[i - 1][1], "label": label}
        for i, (prompt, response, label) in enumerate(rows)
    ]


def first_half_wins(completions: list[str], **_: Any) -> list[float]:
    """A reward function: OnlineDPOTrainer has the first responses of all prompts first, then the second ones."""
    half = len(completions) // 2
    return [1.0] * half + [0.0] * half


class GivenResponses(OnlineDPOTrainer):
    """OnlineDPOTrainer with its generation replaced: what it would have sampled is `given`."""

    given: list[Example]

    def _generate(self, model: nn.Module, prompts: list[str], images: Any = None) -> tuple[Any, ...]:
        pad = self.processing_class.pad_token_id
        prompt = _padded([e.prompt for e in self.given] * 2, pad, left=True)
        response = _padded([e.chosen for e in self.given] + [e.rejected for e in self.given], pad, left=False)
        return *prompt, *response, None


def _padded(rows: list[list[int]], pad: int, left: bool) -> tuple[Tensor, Tensor]:
    """(token ids, mask), (len(rows), longest) each."""
    longest = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        gap, gap_mask, row_mask = [pad] * (longest - len(row)), [0] * (longest - len(row)), [1] * len(row)
        ids.append(gap + row if left else row + gap)
        mask.append(gap_mask + row_mask if left else row_mask + gap_mask)
    return torch.tensor(ids), torch.tensor(mask)
