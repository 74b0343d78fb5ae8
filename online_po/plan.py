"""What a run would do, found out before anything expensive starts. `online-po check` prints it.

Reads the config, the tokenizer, the model's config.json and the prompts; starts no engine, no Ray.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from online_po.config import Config
from online_po.errors import ConfigError
from online_po.example_checks import check_prompt_columns
from online_po.example_mix import wanted
from online_po.given import ResponseEncoder
from online_po.judge_configs import JudgeBase, single_judges
from online_po.judge_trials import known_pairs
from online_po.loss_checks import check_custom_losses, reads_scores
from online_po.memory import memory
from online_po.model_config import find_model, kv_numbers_per_token, load_tokenizer, read_model_config
from online_po.model_content import count_weights
from online_po.prompts import PromptSet, load_prompts
from online_po.room import RoundBytes
from online_po.seed_pairs import PairRow, SeedPairs, load_seed_pairs, require_scores
from online_po.step_checkpoints import KEPT

GIB = 1024**3
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What the plan needs to know of a model, from its config and its weights on disk."""

    context: int
    """Longest sequence it takes, in tokens."""
    parameters: int
    """Number of weights, tied ones once."""
    kv_bytes_per_token: int
    """KV cache of one token over all layers, in the engine's type."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A config that was found runnable, with everything that was loaded to find out."""

    config: Config
    model_path: Path
    """Local folder of the starting model."""
    tokenizer: Any
    train: PromptSet
    heldout: PromptSet | None
    seed_pairs: SeedPairs | None
    known: list[PairRow]
    """Pairs of which the better response is known, to try the judge on."""
    encode: ResponseEncoder | None
    """Tokenises given responses, where the config has such."""
    shape: ModelShape
    need: Estimate
    figures: dict[str, str]
    """Label -> estimate, for people: rounds, tokens, steps, memory, disk."""
    warnings: list[str]


def make_plan(config: Config, on_progress: Callable[[int, int], None] | None = None) -> Plan:
    """Checks everything that can be known without starting an engine.

    Raises ConfigError for a model, tokenizer, prompt file, judge or engine that cannot be used.
    """
    from actors.engines import check_engine
    from judges.runtime import check_judge, check_judge_fits

    check_judge(config.judge)
    check_engine(config)
    check_custom_losses(config)
    model_path = resolve_model(config)
    shape = read_shape(config, model_path)
    tokenizer = load_tokenizer(model_path, config.model.path)
    check_judge_fits(config.judge, tokenizer)
    train, heldout = load_prompts(config.prompts, tokenizer, config.run.seed, on_progress)
    known = known_pairs(config.judge)
    if reads_constraints(config.judge):
        from judges.rules import validate_constraints

        prompts = itertools.chain(train, heldout or ())
        rows = ((f"prompt {prompt.messages[-1]['content'][:60]!r}", prompt.metadata) for prompt in prompts)
        for where, metadata in itertools.chain(rows, ((pair.where, pair.metadata) for pair in known)):
            try:
                validate_constraints(metadata)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
    check_prompt_columns(config, train)
    encode, seed_pairs = _given(config, tokenizer, heldout, shape)
    if config.loop.prompts_per_round > len(train):
        raise ConfigError(
            f"loop.prompts_per_round is {config.loop.prompts_per_round}, but only {len(train)} prompts are left to "
            "train on; lower it or give more prompts"
        )
    longest = max(int(p.token_counts.max()) for p in (train, heldout) if p is not None)
    length = longest + config.generator.max_tokens
    if length > shape.context:
        raise ConfigError(
            f"generator.max_tokens is {config.generator.max_tokens} and the longest prompt has {longest} tokens: "
            f"together {length}, beyond the model's context of {shape.context}; lower generator.max_tokens or "
            "prompts.max_tokens"
        )
    if config.generator.max_model_len is not None and config.generator.max_model_len > shape.context:
        raise ConfigError(
            f"generator.max_model_len is {config.generator.max_model_len}, beyond the model's context of "
            f"{shape.context}"
        )
    _require_kv_cache(config, shape)
    need = estimate(config, shape)
    _require_memory(config, need)
    return Plan(
        config=config,
        model_path=model_path,
        tokenizer=tokenizer,
        train=train,
        heldout=heldout,
        seed_pairs=seed_pairs,
        known=known,
        encode=encode,
        shape=shape,
        need=need,
        figures=_figures(config, shape, need, train, heldout, seed_pairs),
        warnings=[
            *_resource_warnings(config, need),
            *_setting_warnings(config, need),
            *_recipe_warnings(config, seed_pairs),
        ],
    )


def reads_constraints(judge: JudgeBase) -> bool:
    """Whether it, or a member of it, is the rules judge."""
    return any(single.kind == "rules" for single in single_judges(judge))


def _given(
    config: Config, tokenizer: Any, heldout: PromptSet | None, shape: ModelShape
) -> tuple[ResponseEncoder | None, SeedPairs | None]:
    """What tokenises given responses, and the seed pairs, where the config has such. Raises ConfigError."""
    if config.pairs.strategy != "spin" and config.pairs.seed_path is None:
        return None, None
    encode = ResponseEncoder(
        tokenizer,
        apply_chat_template=config.prompts.apply_chat_template,
        max_length=min(config.prompts.max_tokens + config.generator.max_tokens, shape.context),
    )
    if config.pairs.seed_path is None:
        return encode, None
    held_out = heldout.asked() if heldout is not None else set()
    seed_pairs = load_seed_pairs(config.pairs.seed_path, config.prompts, tokenizer, encode, held_out)
    for loss in config.loss:
        if reads_scores(loss):
            require_scores(seed_pairs, config.pairs.seed_path, loss.name)
    return encode, seed_pairs


def resolve_model(config: Config) -> Path:
    """The local folder of `model.path`: itself, or the hub's snapshot. Raises ConfigError."""
    return find_model(config.model.path, config.model.revision)


def read_shape(config: Config, model_path: Path) -> ModelShape:
    """Context, size and KV cache of a model, from its files. Raises ConfigError."""
    text_config = read_model_config(model_path, config.model.path).get_text_config()
    if not list(model_path.glob("*.safetensors")):
        raise ConfigError(
            f"model.path is {config.model.path!r}, which holds no .safetensors file; other formats can execute code "
            "when loaded, so convert it first (load with transformers, then save_pretrained)"
        )
    try:
        parameters = count_weights(model_path)
    except ConfigError as error:
        raise ConfigError(f"model.path is {config.model.path!r}: {error}") from error
    return ModelShape(
        context=int(getattr(text_config, "max_position_embeddings", 0) or 1 << 30),
        parameters=parameters,
        kv_bytes_per_token=kv_numbers_per_token(text_config) * BYTES[engine_dtype(config)],
    )


def model_fingerprint(model_path: Path) -> dict[str, Any]:
    """Names and sizes of the starting model's weight files, and its config: what a resume compares."""
    weights = {path.name: path.stat().st_size for path in sorted(model_path.glob("*.safetensors"))}
    return {"weights": weights, "config": json.loads((model_path / "config.json").read_text())}


def _require_kv_cache(config: Config, shape: ModelShape) -> None:
    """Raises ConfigError where not even one sequence fits into a CPU engine's KV cache."""
    length = config.generator.max_model_len or config.prompts.max_tokens + config.generator.max_tokens
    need = min(length, shape.context) * shape.kv_bytes_per_token / GIB
    if on_cpu(config) and config.generator.engine == "vllm" and need > config.generator.cpu_kv_cache_gib:
        raise ConfigError(
            f"generator.cpu_kv_cache_gib is {config.generator.cpu_kv_cache_gib:g}, but one sequence of {length} tokens "
            f"takes {need:.2f} GiB; raise it, or lower generator.max_tokens or prompts.max_tokens"
        )


def on_cpu(config: Config) -> bool:
    """Whether a run on this machine would use its CPU: torch's CPU build or no GPU driver here, and no cluster
    elsewhere."""
    has_driver = shutil.which("nvidia-smi") is not None or Path("/proc/driver/nvidia/gpus").is_dir()
    return config.ray.address is None and (not has_driver or importlib.metadata.version("torch").endswith("+cpu"))


def engine_dtype(config: Config) -> str:
    """`generator.dtype`, with what `auto` means here."""
    if config.generator.dtype != "auto":
        return config.generator.dtype
    return "float32" if on_cpu(config) else "bfloat16"


def _judge_memory(config: Config) -> float:
    """Bytes that one judge process takes for its models; 0 for judges that hold none."""
    from judges.held import held_models

    auto = "float32" if on_cpu(config) else "bfloat16"
    return sum(
        model.weights * BYTES[auto if model.dtype == "auto" else model.dtype] for model in held_models(config.judge)
    )


def _require_memory(config: Config, need: Estimate) -> None:
    """Raises ConfigError where a CPU could not even hold one engine, or one learner rank, with nothing beside it."""
    total = memory().total
    if not on_cpu(config):
        return
    if need.generator > total:
        cache = f"generator.cpu_kv_cache_gib (now {config.generator.cpu_kv_cache_gib:g}), "
        raise ConfigError(
            f"generator: one engine takes about {need.generator / GIB:.1f} GiB, but this machine has "
            f"{total / GIB:.1f} GiB in all; lower {cache if config.generator.engine == 'vllm' else ''}"
            f"the bytes of generator.dtype (now {engine_dtype(config)}) or the size of model.path's model"
        )
    if need.learner > total:
        remedy = "" if config.learner.lora is not None else "set learner.lora, or "
        raise ConfigError(
            f"learner: one rank takes about {need.learner / GIB:.1f} GiB, but this machine has {total / GIB:.1f} GiB "
            f"in all; {remedy}give a smaller model as model.path"
        )
    if need.judge > total:
        raise ConfigError(
            f"judge: one process takes about {need.judge / GIB:.1f} GiB, but this machine has {total / GIB:.1f} GiB in "
            "all; give a smaller model as judge.path, or set judge.dtype: bfloat16"
        )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Bytes that a run needs, roughly, and what it would do; for people."""

    learner: float
    """Memory of one learner rank but for activations."""
    generator: float
    """Memory of one engine."""
    judge: float
    """Memory of one judge process for its models."""
    disk: float
    """The run folder at its largest."""
    round: RoundBytes
    """What one round takes on the disk."""
    examples: int
    """Most pairs, or labelled responses, a round can give."""
    steps: int
    """Most optimizer steps of a round."""


def estimate(config: Config, shape: ModelShape) -> Estimate:
    """What a run needs at most."""
    loop, learner, generator = config.loop, config.learner, config.generator
    n = loop.responses_per_prompt
    own = loop.most_prompts * _per_prompt(config)
    examples = own + sum(wanted(own, config.pairs.replay_share, config.pairs.seed_share))
    weights = shape.parameters * BYTES[learner.param_dtype]
    # Full: weights, gradients, two moments, and a reference of its own unless it is the sampling policy.
    kind = config.reference.kind
    own_reference = kind in ("fixed", "ema", "kl") or config.reference.every > 1 or config.measures_kl_to_start
    copies = 1 if learner.lora is not None else 4 + own_reference
    saved = 0 if learner.lora is not None else 3 * weights
    # One more than is kept, while a round is being committed.
    kept = min((config.checkpoint.keep or loop.rounds) + 1, loop.rounds)
    if config.guards.rolling_back:
        # What a roll-back takes out of the run keeps its weights: usually two rounds, and those made ahead.
        kept += (config.guards.max_roll_backs + 1) * (2 + loop.max_staleness)
    best = weights if config.eval.every > 0 and learner.lora is None else 0
    # References of kept rounds beside their own policies: means, and one policy from before.
    references = {"ema": kept + 1, "kl": 1, "refresh": int(config.reference.every > 1)}.get(kind, 0)
    # Text, token ids and float32 logps, compressed: about 10 bytes a token.
    data = loop.rounds * loop.most_prompts * n * generator.max_tokens * 10
    # Two step checkpoints and one under way, which is a copy in the machine's memory until it is written.
    stepwise = saved if config.checkpoint.every_steps is not None else 0
    cache = generator.cpu_kv_cache_gib * GIB if on_cpu(config) and generator.engine == "vllm" else 0
    return Estimate(
        learner=copies * weights / learner.ranks + (stepwise if on_cpu(config) else 0),
        generator=shape.parameters * BYTES[engine_dtype(config)] / generator.tensor_parallel + cache,
        judge=_judge_memory(config),
        disk=kept * saved + (KEPT + 1) * stepwise + references * saved / 3 + best + data,
        round=RoundBytes(
            weights=saved + (saved // 3 if kind == "ema" else 0),
            data=data // loop.rounds,
            steps=(KEPT + 1) * stepwise,
        ),
        examples=examples,
        steps=math.ceil(examples / learner.global_batch_size) * learner.epochs,
    )


def _per_prompt(config: Config) -> int:
    """Most pairs, or labelled responses, that a prompt can give."""
    pairs, n = config.pairs, config.loop.responses_per_prompt
    if config.example_kind == "labels":
        return 2 * max(1, int(config.labels.share * n)) if config.labels.rule == "top_bottom" else n
    if pairs.strategy == "spin":
        return min(n, pairs.max_per_prompt or 1)
    most = {"top_bottom_k": pairs.k, "all": n * (n - 1) // 2}.get(pairs.strategy, 1)
    return min(most, pairs.max_per_prompt or most)


def _figures(
    config: Config,
    shape: ModelShape,
    need: Estimate,
    train: PromptSet,
    heldout: PromptSet | None,
    seed_pairs: SeedPairs | None,
) -> dict[str, str]:
    loop, n = config.loop, config.loop.responses_per_prompt
    responses = loop.prompts_per_round * n
    most = f" (with loop.top_up up to {loop.most_prompts * n:,})" if loop.most_prompts > loop.prompts_per_round else ""
    held = f"{len(heldout):,} held out" if heldout is not None else "none held out"
    epochs = loop.rounds * loop.prompts_per_round / len(train)
    mix = f", {config.pairs.replay_share:.0%} of them of earlier rounds" if config.pairs.replay_share else ""
    if seed_pairs is not None:
        mix += f", {config.pairs.seed_share:.0%} of them out of {seed_pairs.table.num_rows:,} seed pairs"
    cache = ", and its KV cache"
    if config.generator.engine == "vllm":
        left = ", and the KV cache that generator.gpu_memory_utilization leaves"
        cache = " with its KV cache" if on_cpu(config) else left
    return {
        "model": f"{shape.parameters / 1e6:,.1f} M weights, context of {shape.context:,} tokens",
        "prompts": f"{len(train):,} to train on, {held}; {train.token_counts.mean():,.0f} tokens on average",
        **_left_out("train prompts", train.counts),
        **(_left_out("held-out prompts", heldout.counts) if heldout is not None else {}),
        **(_left_out("seed pairs left out", seed_pairs.counts) if seed_pairs is not None else {}),
        "rounds": f"{loop.rounds} of {loop.prompts_per_round:,} prompts x {n} responses ({epochs:.2f} epochs)",
        "responses": f"{responses:,} a round{most}, up to {loop.most_prompts * n * config.generator.max_tokens:,} "
        "tokens",
        config.example_kind: f"up to {need.examples:,} a round: {need.steps:,} optimizer steps, "
        f"{need.steps * loop.rounds:,} in all{mix}",
        "learner memory": f"about {need.learner / GIB:.1f} GiB a rank (of {config.learner.ranks}), and activations",
        "engine memory": f"about {need.generator / GIB:.1f} GiB a replica (of {config.generator.replicas}){cache}",
        **_judge_figures(config, need),
        "disk": f"up to {need.disk / GIB:.1f} GiB in {config.run_dir}",
    }


def _judge_figures(config: Config, need: Estimate) -> dict[str, str]:
    """The models of a judge that holds some."""
    from judges.held import held_models

    models = held_models(config.judge)
    if not models:
        return {}
    sizes = " + ".join(f"{model.weights / 1e6:,.1f} M" for model in models)
    context = min(model.context for model in models)
    return {
        "judge": f"{config.judge.kind}, {sizes} weights, reads {context:,} tokens",
        "judge memory": f"about {need.judge / GIB:.1f} GiB a process (of {config.judge.workers}), and activations",
    }


def _left_out(label: str, counts: dict[str, int]) -> dict[str, str]:
    """Rows that are not used, by reason; nothing if all are."""
    reasons = {k: v for k, v in counts.items() if v and k not in ("loaded", "used")}
    if not reasons:
        return {}
    text = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in reasons.items())
    return {label: f"{counts['loaded']:,} loaded, not used: {text}"}


def _resource_warnings(config: Config, need: Estimate) -> list[str]:
    """Disk or memory that others use now."""
    found = []
    folder = next(parent for parent in config.run_dir.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if need.disk > free:
        found.append(
            f"run.dir: {free / GIB:.1f} GiB free, up to {need.disk / GIB:.1f} GiB needed; free some, lower "
            "checkpoint.keep or choose another run.dir"
        )
    wanted = need.learner * config.learner.ranks + need.generator * config.generator.replicas
    wanted += need.judge * config.judge.workers
    available = memory().available
    if on_cpu(config) and wanted > available:
        found.append(
            f"memory: {available / GIB:.1f} GiB available, about {wanted / GIB:.1f} GiB needed; lower "
            f"generator.cpu_kv_cache_gib or generator.replicas, {'lower judge.workers, ' if need.judge else ''}or set "
            "learner.lora"
        )
    return found


def _setting_warnings(config: Config, need: Estimate) -> list[str]:
    """Settings that are allowed, but do not do what they say."""
    found = []
    if (every := config.checkpoint.every_steps) is not None and every >= need.steps:
        found.append(
            f"checkpoint.every_steps is {every}, but a round makes {need.steps} optimizer steps at most, and after its "
            "last the round itself is saved: no step checkpoint is written; lower it"
        )
    loop, generator, batch = config.loop, config.generator, config.learner.global_batch_size
    if batch > need.examples:
        found.append(
            f"learner.global_batch_size is {batch}, but a round gives {need.examples} {config.example_kind} at most, "
            "so no batch is ever full; lower it, or raise loop.prompts_per_round"
        )
    chunks = math.ceil(loop.prompts_per_round / generator.chunk_prompts)
    if chunks < generator.replicas:
        found.append(
            f"generator.replicas is {generator.replicas}, but loop.prompts_per_round = {loop.prompts_per_round} makes "
            f"{chunks} chunks of generator.chunk_prompts = {generator.chunk_prompts}, so "
            f"{generator.replicas - chunks} stay idle; lower generator.chunk_prompts or generator.replicas"
        )
    # Of a cluster elsewhere it is not known which one has no effect.
    inert = "gpu_memory_utilization" if on_cpu(config) else "cpu_kv_cache_gib"
    value, default = getattr(generator, inert), type(generator).model_fields[inert].default
    if config.ray.address is None and value != default:
        machine = "no GPU" if on_cpu(config) else "GPUs"
        found.append(f"generator.{inert} is {value:g}, which has no effect on this machine: it has {machine}")
    return found


def _recipe_warnings(config: Config, seed_pairs: SeedPairs | None) -> list[str]:
    """Shares, references and stops that a run of this size never gets to see."""
    found = []
    loop, pairs, reference, stop = config.loop, config.pairs, config.reference, config.eval.early_stop
    own = loop.prompts_per_round * _per_prompt(config)
    counts = dict(zip(("replay_share", "seed_share"), wanted(own, pairs.replay_share, pairs.seed_share), strict=True))
    for name, count in counts.items():
        if getattr(pairs, name) and count == 0:
            found.append(
                f"pairs.{name} is {getattr(pairs, name):g}, which of {own} {config.example_kind} a round is less than "
                "one, so none is mixed in; raise it, or loop.prompts_per_round"
            )
    if seed_pairs is not None and counts["seed_share"] > seed_pairs.table.num_rows:
        found.append(
            f"pairs.seed_share is {pairs.seed_share:g}, up to {counts['seed_share']} pairs a round, but "
            f"pairs.seed_path has {seed_pairs.table.num_rows}, and none comes twice in a round: the share may be "
            "smaller; lower it, or give more pairs"
        )
    if reference.every == loop.rounds and reference.kind in ("refresh", "ema", "kl"):
        found.append(
            f"reference.kind is {reference.kind}, but with loop.rounds = {loop.rounds} the reference does not change "
            "before the run is over; raise loop.rounds" + (", or lower reference.every" if reference.every > 1 else "")
        )
    if stop is not None and stop.patience >= math.ceil(loop.rounds / config.eval.every):
        found.append(
            f"eval.early_stop.patience is {stop.patience}, but with loop.rounds = {loop.rounds} and eval.every = "
            f"{config.eval.every} that many evaluations without a gain are there at the run's end at the earliest; "
            "lower it, or raise loop.rounds"
        )
    return found
