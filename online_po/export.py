"""A policy out of a run folder, into a folder that transformers and vLLM load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from online_po.errors import ConfigError
from online_po.evaluation import best_version
from online_po.files import atomic_folder
from online_po.ledger import Ledger
from online_po.plan import resolve_model
from online_po.retention import heldout_scores
from online_po.sections import ModelConfig


def export(run_dir: Path, out: Path, round_: int | None = None, merge: bool = False) -> Path:
    """Writes the policy of a round (default: `default_round`) to `out`; returns it as an absolute path.

    Full weights are copied as they are; a LoRA adapter is copied as an adapter that names the starting model as
    model.path does, or with `merge` added to the starting model's weights. Raises ConfigError for a round
    or folder that cannot be used and LedgerError for weights that are gone or damaged.
    """
    ledger = Ledger.open(run_dir)
    if round_ is None:
        round_ = default_round(run_dir)
    last = _last(ledger)
    if not 1 <= round_ <= last:
        raise ConfigError(f"--round is {round_}; run {str(run_dir)!r} has trained rounds 1 to {last}")
    written, out = out, out.resolve()
    if out.exists():
        raise ConfigError(f"OUT is {str(written)!r}, but {str(out)!r} exists already; give a new folder")
    policy = ledger.policy(round_, Path())
    if merge and not policy.is_adapter:
        raise ConfigError("--merge is for LoRA runs; this run trained all weights, export it without --merge")
    with atomic_folder(out) as folder:
        if not merge:
            shutil.copytree(policy.path, folder, dirs_exist_ok=True)
            if policy.is_adapter:
                _name_start(folder / "adapter_config.json", ledger.config().model)
        else:
            _merge(resolve_model(ledger.config()), policy.path, folder)
    return out


def default_round(run_dir: Path) -> int:
    """The round whose policy is exported unless said: the best one evaluated where eval.early_stop is on, else the last
    committed. Raises ConfigError where that is the start, which is exported nowhere."""
    ledger = Ledger.open(run_dir)
    last = _last(ledger)
    if ledger.config().eval.early_stop is None:
        return last
    best = best_version(heldout_scores(ledger, last))
    if best == 0:
        raise ConfigError(
            "eval.early_stop is on, so the best policy is exported, but no round scored higher on the held-out prompts "
            "than the starting model; give --round for one of them"
        )
    return last if best is None else best


def _last(ledger: Ledger) -> int:
    last = ledger.last_committed()
    if not last:
        raise ConfigError(f"run {str(ledger.root)!r} has no trained round yet; nothing to export")
    return last


def _name_start(path: Path, model: ModelConfig) -> None:
    """An adapter of a run names the local folder its start was loaded from; elsewhere only what the user wrote
    is of use."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": model.path, "revision": model.revision}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _merge(start: Path, adapter: Path, folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(start, dtype="auto", trust_remote_code=False)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(start, trust_remote_code=False).save_pretrained(folder)
