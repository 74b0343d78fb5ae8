"""Reward models by vLLM's pooling runner, in the process that calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from judges.reward_files import LETTERS, SETTING, RewardFiles
from judges.reward_scorer import RewardScorer, make_scorer
from online_po.errors import ConfigError, EngineError
from online_po.judge_configs import RewardModel
from online_po.model_config import kv_numbers_per_token
from online_po.model_content import count_weights

GIB = 1 << 30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BATCH_TOKENS = {"cpu": 2048, "gpu": 16384}
"""`judge.batch_tokens: null` for vLLM."""
RESCALED = ("logits_scaling", "logit_scale", "final_logit_softcapping")


def load_reward_model(config: RewardModel, files: RewardFiles) -> RewardScorer:
    """A `judges.reward_scorer.MakeScorer` that knows both engines."""
    if config.engine == "vllm":
        return VllmScorer(config, files)
    return make_scorer(config, files)


class VllmScorer:
    """A reward model in vLLM: hidden state of the last token, head in float32, no activation.

    A causal language model that compares is turned into a classifier whose one row is the LM head's for A minus that
    for B. vLLM makes its own batches, and keeps the prompt that a group's responses share. Raises EngineError if vLLM
    cannot start, ConfigError for a model it would read otherwise than transformers does.
    """

    batch_tokens: int | None = None

    def __init__(self, config: RewardModel, files: RewardFiles) -> None:
        import vllm
        from vllm.platforms import current_platform

        text_config = files.settings.get_text_config()
        overrides: dict[str, Any] = {}
        if files.letters is not None:
            rescaled = [name for name in RESCALED if getattr(text_config, name, None) is not None]
            if rescaled:
                raise ConfigError(
                    f"{SETTING} is {config.path!r}, whose config.json sets {rescaled[0]}, which vLLM's pooling runner "
                    "leaves out; set judge.engine: transformers"
                )
            a, b = LETTERS
            architecture = files.settings.architectures[0].replace("ForCausalLM", "ForSequenceClassification")
            overrides = {
                "architectures": [architecture],
                "classifier_from_token": [b, a],
                "method": "from_2_way_softmax",
            }
        on_cpu: bool = current_platform.is_cpu()
        dtype: str = config.dtype
        if dtype == "auto":
            dtype = "bfloat16" if not on_cpu and current_platform.has_device_capability(80) else "float32"
        batch = max(config.batch_tokens or BATCH_TOKENS["cpu" if on_cpu else "gpu"], files.limit)
        cache = batch * kv_numbers_per_token(text_config) * BYTES[dtype]
        settings: dict[str, Any] = {
            "runner": "pooling",
            "dtype": dtype,
            "hf_overrides": overrides,
            "max_model_len": files.limit,
            "max_num_batched_tokens": batch,
            "enforce_eager": on_cpu,
            "distributed_executor_backend": "uni",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
        }
        if on_cpu:
            # Whole blocks are handed out: two for each sequence more than its tokens take.
            settings |= {"kv_cache_memory_bytes": int(2 * cache) + (64 << 20), "block_size": 32, "max_num_seqs": 32}
        else:
            # What it needs and no more: others may have the rest of the GPU.
            need = 1.15 * count_weights(files.folder) * BYTES[dtype] + 2 * cache + 4 * GIB
            settings["gpu_memory_utilization"] = min(0.9, need / current_platform.get_device_total_memory())
        try:
            self._llm = vllm.LLM(str(files.folder), **settings)
        except Exception as error:  # vLLM raises many types here; each means the same to the user
            reason = " ".join(str(error).split()) or type(error).__name__
            raise EngineError(
                f"{SETTING} is {config.path!r}, which vLLM's pooling runner could not load: {reason[:300]}; lower "
                "judge.max_length if it is memory, or set judge.engine: transformers"
            ) from error
        self._params = vllm.PoolingParams(use_activation=False)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        """See `judges.reward_scorer.RewardScorer`."""
        prompts: Any = [{"prompt_token_ids": list(sequence)} for sequence in sequences]
        outputs = self._llm.encode(prompts, self._params, pooling_task="classify", use_tqdm=False)
        return [float(output.outputs.data.item()) for output in outputs]
