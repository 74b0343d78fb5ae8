"""What the engine tests share: requests, policies on disk, and what transformers says of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from online_po.config import Config
from online_po.sections import SamplingConfig
from online_po.types import Group, Policy, Probe, Prompt, Request

PROMPT_IDS = tuple(range(20, 60))
"""Longer than one 32-token block of the KV cache, so that samples share prefix blocks."""


def make_config(path: Path, *, lora: bool = False, adapters: str = "", **generator: Any) -> Config:
    """`adapters`: for policies that are adapters, how the engine holds them (`generator.lora`)."""
    settings: dict[str, Any] = {"max_tokens": 24, "threads": 1, "max_num_seqs": 16, "dtype": "float32"}
    if adapters:
        settings["lora"] = adapters
    if generator.get("engine") != "transformers":
        settings["cpu_kv_cache_gib"] = 0.25
    return Config.parse(
        {
            "run": {"name": "test"},
            "model": {"path": str(path)},
            "prompts": {"path": "prompts.jsonl", "heldout_size": 1, "max_tokens": 64},
            "generator": settings | generator,
            "learner": {"lora": {"rank": 4} if lora or adapters else None},
        }
    )


def make_request(number: int, samples: int = 3) -> Request:
    """Prompts of different lengths that share a beginning."""
    ids = (*PROMPT_IDS, *range(100 + number, 103 + 2 * number))
    prompt = Prompt(id=f"p{number}", messages=(), text="", token_ids=ids)
    return Request(prompt=prompt, seeds=tuple(1000 * number + i for i in range(samples)))


def in_order(answers: Iterable[dict[int, Group]]) -> list[Group]:
    """The groups of one chunk, in order of its requests; each must have come once."""
    found: dict[int, Group] = {}
    for groups in answers:
        assert not groups.keys() & found.keys()
        found |= groups
    assert sorted(found) == list(range(len(found)))
    return [found[place] for place in range(len(found))]


def by_chunk(answers: Iterable[tuple[int, dict[int, Group]]]) -> dict[int, list[Group]]:
    """The groups of each chunk, in order of its requests; each must have come once."""
    parts: dict[int, list[dict[int, Group]]] = {}
    for index, groups in answers:
        parts.setdefault(index, []).append(groups)
    return {index: in_order(found) for index, found in parts.items()}


def plain_piece(text: str) -> str:
    """Two letters from inside a random text, whose other characters may be broken ones."""
    found = re.search(r"[a-z]{2}", text[2:])
    assert found is not None, text
    return found.group()


def teacher_forced(policy: Policy, token_ids: tuple[int, ...], base: Path) -> list[float]:
    """(T - 1,) logps by transformers (and peft) in float32, read afresh from the policy's folder."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base if policy.is_adapter else policy.path, dtype="float32")
    if policy.is_adapter:
        model = PeftModel.from_pretrained(model, policy.path)
    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        logps = model.eval()(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return logps.gather(-1, ids[0, 1:, None])[:, 0].tolist()


def make_probe(policy: Policy, base: Path) -> Probe:
    return Probe(token_ids=PROMPT_IDS, token_logps=tuple(teacher_forced(policy, PROMPT_IDS, base)))


def make_adapter(base: Path, out: Path, seed: int) -> Policy:
    """A LoRA adapter with weights that matter, as peft saves it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out)
    return Policy(version=seed, path=out, is_adapter=True)


class _Owner:
    """An actor that shares the weights of a folder, as the learner does."""

    def share(self, folder: Path) -> Any:
        from safetensors.torch import load_file

        from actors.shared_weights import share

        return share(load_file(folder / "model.safetensors"))


def shared_policy(base: Path, folder: Path) -> tuple[Any, Policy, Probe]:
    """(the actor that holds it, policy 1 in memory and in no folder, its probe); `folder` has the same weights."""
    import ray

    owner = ray.remote(num_cpus=0)(_Owner).remote()
    shared = ray.get(owner.share.remote(folder))
    policy = Policy(version=1, path=folder / "not yet", shared=shared)
    return owner, policy, make_probe(Policy(version=1, path=folder), base)


def check_shared_sync(group: Any, base: Path, folder: Path, sampling: SamplingConfig) -> None:
    """Weights from memory are the folder's, bit for bit; once let go they are read from there."""
    import ray

    start, asked = Policy(version=0, path=base), [(0, [make_request(0), make_request(1)])]
    owner, policy, probe = shared_policy(base, folder)
    saved = Policy(version=1, path=folder)
    reports = group.sync(policy, probe)
    assert all(report.policy_version == 1 and report.mean_logp_error < 1e-3 for report in reports)
    from_memory = by_chunk(group.generate(asked, sampling))
    assert_logps_are_the_policys(from_memory[0], saved, base)
    ray.kill(owner)  # the engines have it now
    group.sync(start, make_probe(start, base))
    group.sync(saved, probe)
    assert by_chunk(group.generate(asked, sampling)) == from_memory
    policy.shared.let_go()
    group.sync(replace(policy, path=folder), probe)
    group.sync(start, make_probe(start, base))


def assert_logps_are_the_policys(groups: list[Group], policy: Policy, base: Path) -> None:
    """The record's logps are what transformers says of the very token ids in it."""
    for group in groups:
        response = group.responses[0]
        prompt = group.prompt.token_ids
        said = teacher_forced(policy, prompt + response.token_ids, base)[len(prompt) - 1 :]
        assert len(said) == len(response.token_logps)
        assert max(abs(a - b) for a, b in zip(said, response.token_logps, strict=True)) < 1e-3
        assert response.policy_version == policy.version
