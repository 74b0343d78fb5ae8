"""The sections of a configuration: their fields, and the checks that a section can make alone.

Every field is read by something. Imports neither torch nor ray.
"""

from __future__ import annotations

import math
import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _local(value: str) -> str:
    return os.path.abspath(os.path.expandvars(os.path.expanduser(value)))


def _local_or_hub(value: str) -> str:
    return _local(value) if os.path.exists(_local(value)) else os.path.expandvars(os.path.expanduser(value))


LocalPath = Annotated[str, AfterValidator(_local)]
"""A path on this machine: `~` and environment variables are expanded, a relative one starts at the working folder."""

LocalOrHub = Annotated[str, AfterValidator(_local_or_hub)]
"""The same where such a file or folder exists; else a name at the hub."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class RunConfig(Section):
    """Where the run lives and what makes it repeatable."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its folder.")
    dir: LocalPath = Field("runs", description="Folder that holds run folders.")
    seed: int = Field(0, ge=0, description="All randomness of the run comes from this number.")
    tensorboard: bool = Field(True, description="Also write metrics as TensorBoard events.")
    grace_s: float = Field(
        20.0,
        ge=0,
        description="Seconds that a signal to stop (Ctrl-C, SIGTERM, SIGUSR1) leaves for finishing what is being made; "
        "a second signal ends the run at once. Below what the scheduler leaves before it kills.",
    )


class ModelConfig(Section):
    """The starting model: local folder or hub id."""

    path: LocalOrHub = Field(
        description="Local Hugging Face folder or hub id of the starting policy (on a cluster: a folder all nodes see)."
    )
    revision: str | None = Field(None, description="Hub revision (branch, tag or commit).")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="Attention implementation of the learner (and of the transformers engine)."
    )


class PromptsConfig(Section):
    """Which prompts are sampled from, and which are held out for evaluation."""

    path: LocalPath | None = Field(None, description="Prompt file: .jsonl, .parquet or .csv. Or give `dataset`.")
    dataset: LocalOrHub | None = Field(
        None, description="Name or local folder of a data set read through `datasets`. Or give `path`."
    )
    subset: str | None = Field(None, description="Configuration name of the data set.")
    split: str = Field("train", description="Split of the data set.")
    column: str = Field("prompt", description="Column with the prompt: text, or a list of {role, content} messages.")
    system: str | None = Field(
        None, description="System prompt put in front of prompts that do not begin with a system message."
    )
    apply_chat_template: bool = Field(
        True, description="Wrap prompts in the tokenizer's chat template; false feeds plain text as it is."
    )
    max_tokens: int = Field(1024, ge=1, description="Longer prompts (in tokens, template included) are skipped.")
    limit: int | None = Field(None, ge=1, description="Use only the first so many prompts of the file.")
    heldout_path: LocalPath | None = Field(
        None, description="Prompt file for evaluation; prompts that also stand in the training file are dropped there."
    )
    heldout_size: int = Field(
        0, ge=0, description="Without `heldout_path`: so many prompts are split off by seed for evaluation."
    )

    @model_validator(mode="after")
    def _check(self) -> PromptsConfig:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give exactly one of prompts.path and prompts.dataset")
        if self.path is None and self.subset is None and self.split == "":
            raise ValueError("prompts.split must not be empty")
        if self.path is not None and (self.subset is not None or self.split != "train"):
            raise ValueError("prompts.subset and prompts.split belong to prompts.dataset, not to prompts.path")
        if self.heldout_path is not None and self.heldout_size:
            raise ValueError("give prompts.heldout_path or prompts.heldout_size, not both")
        return self


class LoopConfig(Section):
    """How much is generated between two weight syncs, and for how long."""

    rounds: int = Field(3, ge=1, description="Rounds to run.")
    prompts_per_round: int = Field(
        64, ge=1, description="Prompts sampled in each round: thousands is iterative, one batch is fully online."
    )
    responses_per_prompt: int = Field(4, ge=1, description="Responses sampled for each prompt.")
    top_up: float = Field(
        0.0,
        ge=0,
        description="Dynamic sampling (DAPO, Yu et al. 2025, arXiv 2503.14476): in place of prompts whose responses "
        "are all scored alike further ones are sampled, at most so many times prompts_per_round. 0: a round trains on "
        "what it gets.",
    )
    max_staleness: int = Field(
        0,
        ge=0,
        le=8,
        description="How many rounds old the sampling policy is. 0: generate, then train. 1 or more: round k+1 is "
        "generated while round k trains, by weights exactly so many rounds old (fewer in the first rounds).",
    )

    @property
    def most_prompts(self) -> int:
        """Prompts that a round samples at most."""
        return self.prompts_per_round + math.floor(self.top_up * self.prompts_per_round + 1e-9)


class SamplingConfig(Section):
    """How responses are drawn."""

    temperature: float = Field(1.0, ge=0, le=10, description="Softmax temperature; 0 is greedy.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus mass.")
    top_k: int = Field(0, ge=0, description="Keep the k likeliest tokens; 0 keeps all.")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="Drop tokens below this share of the likeliest one's probability."
    )
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="Above 1 discourages tokens already seen.")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field((), description="Strings that end a response.")
    max_tokens: int = Field(512, ge=1, description="Response length limit, in tokens.")


class GeneratorConfig(SamplingConfig):
    """The sampling engine and how responses are drawn from it."""

    engine: Literal["vllm", "transformers"] = Field("vllm", description="Inference engine.")
    replicas: int = Field(1, ge=1, description="Engines working side by side.")
    tensor_parallel: int = Field(1, ge=1, description="GPUs that share one vLLM engine.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and compute type. auto: bfloat16 on GPU, float32 on CPU."
    )
    chunk_prompts: int = Field(
        32, ge=1, description="Prompts handed to an engine at once; also the unit that is saved and resumed."
    )
    max_num_seqs: int = Field(
        256,
        ge=1,
        description="Sequences an engine decodes at the same time. May be another one when a run goes on: responses "
        "then differ as far as rounding does.",
    )
    max_model_len: int | None = Field(
        None,
        ge=1,
        description="Context the engine allocates for. null: prompts.max_tokens + generator.max_tokens, as far as "
        "the model's own context goes. It ends no response, and may be another one when a run goes on, but not "
        "where the policy judges itself: a question to it may take no more.",
    )
    gpu_memory_utilization: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Share of a GPU's memory vLLM may take. null: 0.85, 0.4 where a learner rank shares the "
        "GPU, 0.3 where a judge does too.",
    )
    cpu_kv_cache_gib: float = Field(2.0, gt=0, description="KV cache of an engine on the CPU, in GiB.")
    enforce_eager: bool | None = Field(
        None, description="Skip vLLM's compilation. null: true on CPU (starts minutes sooner), false on GPU."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of an engine. null: all cores / replicas.")
    lora: Literal["auto", "adapter", "merged"] = Field(
        "auto",
        description="How vLLM holds a policy that is an adapter. adapter: beside the starting model's weights; a sync "
        "moves the adapter alone. merged: added to them; a sync loads all weights, and sampling costs what it does "
        "without an adapter. auto: merged on CPU, adapter on GPU. May be another one when a run goes on: responses "
        "then differ as far as rounding does.",
    )
    sync_tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest mean difference in nats between a generator's and the learner's log-probabilities of the "
        "probe tokens. null: 1e-3 where engine and learner compute in float32, else 0.15.",
    )

    def merges(self, on_cpu: bool) -> bool:
        """Whether the engine adds adapters to its weights."""
        return self.lora == "merged" or (self.lora == "auto" and on_cpu)


class LoraConfig(Section):
    """Low-rank adapters (LoRA, Hu et al. 2021); without this section all weights are trained."""

    rank: int = Field(16, ge=1, description="Rank of the adapters.")
    alpha: float = Field(32.0, gt=0, description="Scale: the update is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapters' input while training.")
    target_modules: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="Module names that get adapters, or all-linear."
    )


class LearnerConfig(Section):
    """The optimizer's side."""

    ranks: int = Field(1, ge=1, description="Processes that train together (FSDP2): gloo on CPU, NCCL on GPU.")
    lora: LoraConfig | None = Field(None, description="LoRA settings; null trains all weights.")
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Shape of the learning rate over the whole run, after warm-up."
    )
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="Share of the peak that the schedule ends on.")
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of the whole run spent warming up.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay.")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's moment decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient norm is clipped to this.")
    global_batch_size: int = Field(32, ge=1, description="Pairs per optimizer step, over all ranks.")
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="Tokens in one forward pass of one rank, padding included; longer single pairs go alone. May be "
        "another one when a run goes on: results then differ in rounding, and in what LoRA's dropout leaves out. What "
        "was halved for want of memory stays the most.",
    )
    prefix_sharing: bool = Field(
        True,
        description="A prompt and all responses to it go through the model once, without padding, where the model "
        "computes the same so (it is tried at the start, and said where not); false: each response with its own "
        "prompt. May be another one when a run goes on: results then differ in rounding, and in what LoRA's dropout "
        "leaves out.",
    )
    examples_together: int = Field(
        4,
        ge=1,
        description="So many pairs of one prompt are trained on in a row, mostly in one optimizer step, where they "
        "share their prompt. 1: pairs are shuffled singly.",
    )
    epochs: int = Field(1, ge=1, description="Passes over a round's pairs.")
    importance_cap: float | None = Field(
        None,
        ge=1,
        description="Weigh each pair's loss by how much likelier the policy finds its responses now than the one that "
        "sampled them did, per token, and at most by this: truncated importance weights, for responses that are rounds "
        "or steps old (loop.max_staleness). null: no weights.",
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="Recompute activations in backward: less memory, slower. null: from when a single example does not "
        "fit into memory without, on. May be another one when a run goes on: results then differ in rounding at most.",
    )
    param_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type weights are kept and saved in; bfloat16 needs learner.lora."
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Type of the matrix work; losses and logps are float32 always."
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a rank. null: all cores / ranks.")
    kl_to_start: bool | None = Field(
        None,
        description="Also measure KL to the starting policy when the reference is another one "
        "(one more forward pass over the round's pairs). null: yes, unless there is no reference.",
    )

    @model_validator(mode="after")
    def _check(self) -> LearnerConfig:
        if self.global_batch_size % self.ranks:
            raise ValueError(
                f"learner.global_batch_size is {self.global_batch_size}, which learner.ranks = {self.ranks} does not "
                "divide; choose a multiple"
            )
        if self.param_dtype == "bfloat16" and self.compute_dtype == "float32":
            raise ValueError("learner.param_dtype is bfloat16, so learner.compute_dtype must be bfloat16 too")
        if not all(0 <= b < 1 for b in self.betas):
            raise ValueError(f"learner.betas are {self.betas}; both must lie in [0, 1)")
        return self


class EarlyStopConfig(Section):
    """Ends the run where the held-out score stops rising. The best policy's weights are never pruned."""

    patience: int = Field(
        3, ge=1, description="The run ends after so many evaluations on end without a gain over the best."
    )
    min_gain: float = Field(0.0, ge=0, description="A mean held-out score must be higher by more than this.")


class EvalConfig(Section):
    """Evaluation on held-out prompts, the same seeds every time."""

    every: int = Field(1, ge=0, description="Rounds between evaluations (start and end always count); 0: never.")
    responses_per_prompt: int = Field(1, ge=1, description="Responses to each held-out prompt.")
    temperature: float | None = Field(
        None, ge=0, le=10, description="Temperature of evaluation. null: generator.temperature."
    )
    bootstrap_samples: int = Field(2000, ge=100, description="Resamples (over prompts) behind the 95% intervals.")
    early_stop: EarlyStopConfig | None = Field(
        None, description="End the run where the held-out score stops rising, and export the best round; null: never."
    )


class CheckpointConfig(Section):
    """What the run folder keeps to go on from. Not part of a run's identity."""

    keep: int | None = Field(
        2,
        ge=1,
        description="Newest rounds that keep weights and optimizer state; older ones keep their data only, "
        "except the best policy by its held-out score, and one that the reference still needs. null keeps every "
        "round's.",
    )
    every_steps: int | None = Field(
        None,
        ge=1,
        description="Also write the learner's state after every so many optimizer steps of a round, while it goes on: "
        "a round that is stopped then goes on after the last of them. null: it trains again from its first step.",
    )


class RayConfig(Section):
    """The cluster. Not part of a run's identity: a run may continue elsewhere."""

    address: str | None = Field(
        None, description="Address of a running cluster (host:6379), or `auto`. null: a private one on this machine."
    )
    learner_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of one learner rank. null: 1 where the cluster has GPUs, a share where there are too few, "
        "else 0.",
    )
    generator_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of one generator. null: generator.tensor_parallel where there are GPUs, a share where there "
        "are too few, else 0.",
    )
    judge_cpus: float = Field(0.0, ge=0, description="CPUs that Ray reserves for one judge process.")
    judge_gpus: float | None = Field(
        None,
        ge=0,
        description="GPUs of one judge process. null: for judges that hold a model 1 where the cluster has GPUs, a "
        "share where there are too few, else 0.",
    )
    startup_timeout_s: float = Field(600.0, gt=0, description="Seconds to wait for actors to be ready.")
    max_restarts: int = Field(
        3,
        ge=0,
        description="How often an engine, a judge process or the learner that died or hung is started again within "
        "ray.restart_window_s; then the run ends. An engine or learner that goes on with half its batch for "
        "want of memory does not count, unless its process was killed for it.",
    )
    restart_window_s: float = Field(
        3600.0,
        gt=0,
        description="Seconds within which ray.max_restarts are counted; more where an actor that always hangs would "
        "take longer: (ray.max_restarts + 1) times the longest of `limits` and ray.startup_timeout_s together.",
    )

    @model_validator(mode="after")
    def _check(self) -> RayConfig:
        if self.address is not None and self.address.startswith("ray://"):
            raise ValueError(
                f"ray.address is {self.address!r}: a Ray client cannot stream what actors yield; give the head node's "
                "own address (host:6379), or start the run on a node of the cluster with ray.address: auto"
            )
        if self.learner_gpus is not None and self.learner_gpus > 1:
            raise ValueError(
                f"ray.learner_gpus is {self.learner_gpus:g}, but a learner rank uses one GPU; use more learner.ranks"
            )
        for name, unit in (("generator_gpus", "GPUs"), ("judge_gpus", "GPUs"), ("judge_cpus", "CPUs")):
            amount = getattr(self, name)
            if amount is not None and amount > 1 and amount != int(amount):
                raise ValueError(f"ray.{name} is {amount:g}; above 1, Ray gives only whole {unit}: use a whole number")
        return self


class LimitsConfig(Section):
    """Seconds without any progress after which an actor counts as hung: it is named, ended, and started again. They
    bound the smallest piece of work that something comes of (a token, a micro-batch, a tensor, a file that is read or
    written), not the whole of it. Not part of a run's identity."""

    generate_s: float = Field(
        600.0, gt=0, description="An engine: without a step (one more token for all that it samples, or prompts read)."
    )
    judge_s: float = Field(
        1800.0,
        gt=0,
        description="A judge process: without a judged group while it has some. An endpoint may be away for a while; "
        "single calls have judge.timeout_s.",
    )
    step_s: float = Field(1800.0, gt=0, description="A learner rank: without a micro-batch, or an optimizer step.")
    weights_s: float = Field(
        1800.0,
        gt=0,
        description="A rank: while it reads or writes a file of weights, or gathers or spreads one "
        "tensor of them. An engine: while it reads weights and proves them.",
    )
    pulse_s: float = Field(
        300.0, gt=0, description="Any of them, whatever it does: without an answer from its process (stopped, say)."
    )
