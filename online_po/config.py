"""The configuration of a run: YAML in, one validated object out. Imports neither torch nor ray.

Every cross-check of sections that needs no model happens here, at parse time. Checks that need the
tokenizer or the model's context are in `online_po.plan`.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError, model_validator
from yaml.nodes import MappingNode, Node, ScalarNode

from online_po.errors import ConfigError
from online_po.example_checks import check_examples
from online_po.guard_configs import GuardsConfig, check_guards
from online_po.loss_configs import LOSS_BY_NAME, LossName, Sigmoid
from online_po.sections import (
    BetaControlConfig,
    EvalConfig,
    GeneratorConfig,
    JudgeConfig,
    LabelsConfig,
    LearnerConfig,
    LoopConfig,
    ModelConfig,
    PairsConfig,
    PromptsConfig,
    RayConfig,
    ReferenceConfig,
    RunConfig,
    SamplingConfig,
    Section,
)


def _as_list(value: Any) -> Any:
    """One loss is a list of one; a loss without a name is DPO's."""
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(isinstance(loss, dict) for loss in listed):
        return listed
    return [{"name": "sigmoid", **loss} for loss in listed]


class Config(Section):
    """One run."""

    run: RunConfig
    model: ModelConfig
    prompts: PromptsConfig
    loop: LoopConfig = LoopConfig()  # type: ignore[call-arg]
    generator: GeneratorConfig = GeneratorConfig()  # type: ignore[call-arg]
    judge: JudgeConfig = JudgeConfig()  # type: ignore[call-arg]
    pairs: PairsConfig = PairsConfig()  # type: ignore[call-arg]
    labels: LabelsConfig = LabelsConfig()  # type: ignore[call-arg]
    loss: Annotated[tuple[LossName, ...], BeforeValidator(_as_list)] = (Sigmoid(),)  # type: ignore[call-arg]
    """One loss, or several of a mixture."""
    beta_control: BetaControlConfig | None = None
    """What holds the KL to the reference at a target; null: beta is what the losses say."""
    reference: ReferenceConfig = ReferenceConfig()  # type: ignore[call-arg]
    learner: LearnerConfig = LearnerConfig()  # type: ignore[call-arg]
    eval: EvalConfig = EvalConfig()  # type: ignore[call-arg]
    guards: GuardsConfig = GuardsConfig()  # type: ignore[call-arg]
    ray: RayConfig = RayConfig()  # type: ignore[call-arg]

    @model_validator(mode="before")
    @classmethod
    def _no_reference(cls, data: Any) -> Any:
        """Without a section `reference`, losses that need none get none."""
        losses = _as_list(data.get("loss", {}))
        names = [loss["name"] for loss in losses if isinstance(loss, dict)] if isinstance(losses, list) else []
        known = [loss for name, loss in LOSS_BY_NAME.items() if name in names]
        if known and not any(loss.needs_reference for loss in known) and "reference" not in data:
            return data | {"reference": {"kind": "none"}}
        return data

    @model_validator(mode="after")
    def _check(self) -> Config:
        self._check_loss()
        self._check_beta_control()
        self._check_sampler_logps()
        check_examples(self)
        context = self.prompts.max_tokens + self.generator.max_tokens
        if self.generator.max_model_len is not None and self.generator.max_model_len < context:
            raise ValueError(
                f"generator.max_model_len is {self.generator.max_model_len}, below prompts.max_tokens + "
                f"generator.max_tokens = {context}; raise it or lower one of those"
            )
        if self.generator.engine == "transformers" and self.generator.tensor_parallel > 1:
            raise ValueError("generator.tensor_parallel above 1 needs generator.engine: vllm")
        if self.reference.every > self.loop.rounds:
            raise ValueError(
                f"reference.every is {self.reference.every}, but loop.rounds is {self.loop.rounds}: the reference "
                "would never change; lower it or set reference.kind: fixed"
            )
        if self.model.revision is not None and os.path.isdir(self.model.path):
            raise ValueError(
                f"model.revision is {self.model.revision!r}, but model.path is a local folder, which has none; drop it"
            )
        self._check_types()
        self._check_gpus()
        self._refuse_inert()
        if self.loop.max_staleness >= self.loop.rounds:
            raise ValueError(
                f"loop.max_staleness is {self.loop.max_staleness} but loop.rounds is {self.loop.rounds}: no round "
                "would ever train on responses of a trained policy; lower the one or raise the other"
            )
        kept = self.run.keep_checkpoints
        if kept is not None and kept <= self.loop.max_staleness:
            raise ValueError(
                f"run.keep_checkpoints is {kept}, but with loop.max_staleness = {self.loop.max_staleness} older "
                f"weights are still sampled from; keep at least {self.loop.max_staleness + 1}"
            )
        check_guards(
            self.guards,
            keep_checkpoints=kept,
            max_staleness=self.loop.max_staleness,
            measures_kl=self.reference.kind != "none" or self.measures_kl_to_start,
            measures_shift=self.example_kind == "pairs"
            and self.pairs.strategy != "spin"
            and not (self.pairs.replay_share or self.pairs.seed_share),
            evaluates=self.eval.every > 0,
        )
        if self.eval.every == 0 and (self.prompts.heldout_path or self.prompts.heldout_size):
            raise ValueError("eval.every is 0 but held-out prompts are given; drop them or evaluate")
        if self.eval.every > 0 and not (self.prompts.heldout_path or self.prompts.heldout_size):
            raise ValueError(
                "no held-out prompts for evaluation: set prompts.heldout_path or prompts.heldout_size, or eval.every: 0"
            )
        return self

    def _check_loss(self) -> None:
        """What the learner can train with, of what there is."""
        if not self.loss:
            raise ValueError("loss is an empty list; name a loss, or leave it out for DPO")
        other = next((loss for loss in self.loss if loss.kind != self.loss[0].kind), None)
        if other is not None:
            raise ValueError(
                f"loss mixes {self.loss[0].name} ({self.loss[0].kind}) and {other.name} ({other.kind}), but a round "
                "holds pairs or single labelled responses, not both; choose losses of one kind"
            )
        for loss in self.loss:
            if loss.needs_probabilities:
                raise ValueError(
                    "loss.probability is soft, but the judge gives no preference probabilities; use probability: hard"
                )
            beta = getattr(loss, "beta", None)
            if isinstance(beta, tuple) and len(beta) != self.loop.rounds:
                raise ValueError(
                    f"loss.beta of {loss.name} is a list of {len(beta)}, but loop.rounds is {self.loop.rounds}; give "
                    "one for each round"
                )
        # What a custom loss reads is known when it is loaded, see online_po.plan.
        needing = [loss.name for loss in self.loss if loss.needs_reference and loss.name != "custom"]
        if needing and self.reference.kind == "none":
            raise ValueError(
                f"reference.kind is none, but loss.name: {needing[0]} needs a reference; use fixed, refresh, ema or kl"
            )
        if not any(loss.needs_reference for loss in self.loss) and self.reference.kind != "none":
            raise ValueError(
                f"reference.kind is {self.reference.kind}, but loss.name: {self.loss[0].name} has no use for a "
                "reference; leave section reference out, or set reference.kind: none"
            )

    def _check_sampler_logps(self) -> None:
        if self.reference.logps == "learner":
            return
        if self.reference.kind != "refresh" or self.reference.every != 1 or self.loop.max_staleness:
            raise ValueError(
                "reference.logps is sampler, but the reference is not the policy that samples; set reference.kind: "
                "refresh with every: 1 and loop.max_staleness: 0, or reference.logps: learner"
            )
        if self.pairs.strategy == "spin" or self.pairs.replay_share or self.pairs.seed_path is not None:
            what = "strategy: spin" if self.pairs.strategy == "spin" else "replay_share and pairs.seed_path"
            raise ValueError(
                f"reference.logps is sampler, but with pairs.{what} not all responses are the sampler's; use "
                "reference.logps: learner"
            )
        parts = [loss.name for loss in self.loss if loss.name in ("ld_dpo", "kto", "custom")]
        if parts:
            raise ValueError(
                f"reference.logps is sampler, but loss.name: {parts[0]} may read more of the reference than whole "
                "responses' log-probabilities; use reference.logps: learner"
            )

    def _check_beta_control(self) -> None:
        if self.beta_control is None:
            return
        if not any(loss.needs_reference and hasattr(loss, "beta") for loss in self.loss):
            raise ValueError(f"beta_control is set, but loss.name: {self.loss[0].name} has no beta against a reference")
        if self.reference.kind == "none" or (self.reference.kind == "refresh" and self.reference.every == 1):
            raise ValueError(
                f"beta_control is set, but with reference.kind: {self.reference.kind} the KL to the reference is not "
                "there, or starts from zero every round; use reference.kind: fixed, or drop beta_control"
            )

    def _check_types(self) -> None:
        """Number types that would train nothing, or that attention does not compute in."""
        learner = self.learner
        if learner.param_dtype == "bfloat16" and learner.lora is None:
            # At a usual learning rate an AdamW step is below half of a bfloat16 ulp of most weights: rounded to nothing
            raise ValueError(
                "learner.param_dtype is bfloat16, but all weights are trained, and their small steps would be rounded "
                "away; set learner.param_dtype: float32 with learner.compute_dtype: bfloat16, or learner.lora"
            )
        if self.model.attention == "flash_attention_2" and learner.compute_dtype == "float32":
            raise ValueError(
                "model.attention is flash_attention_2, which cannot compute in learner.compute_dtype: float32; set "
                "learner.compute_dtype: bfloat16, or model.attention: sdpa"
            )

    def _check_gpus(self) -> None:
        """GPUs of `ray` against what engines and ranks do with them."""
        engine, rank = self.ray.generator_gpus, self.ray.learner_gpus
        parallel, ranks = self.generator.tensor_parallel, self.learner.ranks
        if parallel > 1 and engine is not None and engine < parallel:
            raise ValueError(
                f"ray.generator_gpus is {engine:g}, but generator.tensor_parallel is {parallel}: an engine needs a GPU "
                "for each part; give as many, or leave ray.generator_gpus out"
            )
        if ranks > 1 and rank is not None and 0 < rank < 1:
            raise ValueError(
                f"ray.learner_gpus is {rank:g}, but learner.ranks is {ranks}: two ranks could be put on one GPU, which "
                "NCCL refuses; set ray.learner_gpus: 1, or leave it and ray.generator_gpus out"
            )
        if ranks > 1 and rank is None and engine is not None and 0 < engine < 1:
            raise ValueError(
                f"ray.generator_gpus is {engine:g}, but learner.ranks is {ranks} and ray.learner_gpus is not given: "
                "ranks share no GPU with one another, which NCCL refuses; set ray.learner_gpus: 1 too, or leave both "
                "out"
            )

    def _refuse_inert(self) -> None:
        """A setting that would be ignored beside another one is refused, not ignored."""
        evaluation = ("responses_per_prompt", "temperature", "bootstrap_samples", "early_stop")
        vllm_only = ("cpu_kv_cache_gib", "gpu_memory_utilization", "enforce_eager")
        rules = [
            (self.pairs.strategy != "top_bottom_k", "pairs", ("k",), "pairs.strategy: top_bottom_k"),
            (self.labels.rule != "top_bottom", "labels", ("share",), "labels.rule: top_bottom"),
            (self.judge.kind == "rules", "judge", ("timeout_s", "concurrency"), "judge.kind: python"),
            (self.generator.engine != "vllm", "generator", vllm_only, "generator.engine: vllm"),
            (self.learner.schedule == "constant", "learner", ("min_lr_ratio",), "another learner.schedule"),
            (self.eval.every == 0, "eval", evaluation, "eval.every above 0"),
        ]
        for inert, section, names, needs in rules:
            model = getattr(self, section)
            for name in names if inert else ():
                if getattr(model, name) != type(model).model_fields[name].default:
                    raise ValueError(
                        f"{section}.{name} is {getattr(model, name)!r}, but has an effect only with {needs}; drop it"
                    )

    @property
    def example_kind(self) -> Literal["pairs", "labels"]:
        """What a round trains on: pairs, or single responses with labels."""
        return "pairs" if self.loss[0].kind == "paired" else "labels"

    @property
    def eval_sampling(self) -> SamplingConfig:
        """Sampling settings of evaluation: the generator's, but for `eval.temperature`."""
        fields = {name: getattr(self.generator, name) for name in SamplingConfig.model_fields}
        if self.eval.temperature is not None:
            fields["temperature"] = self.eval.temperature
        return SamplingConfig(**fields)

    @property
    def measures_kl_to_start(self) -> bool:
        """Whether a round's pairs are also scored under the starting policy, where the reference is another one."""
        wanted = self.learner.kl_to_start
        return self.reference.kind != "none" if wanted is None else wanted

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name

    def identity(self) -> dict[str, Any]:
        """Everything that shapes the run's results. Where it lies, what it runs on, and bounds that stop it may
        differ between two starts.

        Model, prompts and seed pairs are compared by content, see `Ledger.require_same`: prompts and pairs by a hash
        of all they say and of their tokens, the model by its config and the sizes of its weights, then by a probe."""
        shapes = self.model_dump(
            mode="json",
            exclude={
                "ray": True,
                # Guards that roll back are added below: others only tell, or end the run.
                "guards": True,
                "eval": {"early_stop"},
                "run": {"name", "dir", "tensorboard", "keep_checkpoints"},
                "model": {"path", "revision"},
                "prompts": {"path", "dataset", "subset", "split", "heldout_path"},
                "pairs": {"seed_path"},
                "generator": {"replicas", "threads", "gpu_memory_utilization", "cpu_kv_cache_gib", "sync_tolerance"},
                "judge": {"workers", "concurrency", "timeout_s", "max_failure_rate"},
                "learner": {"threads"},
            },
        )
        rolling = self.guards.model_dump(mode="json", include=set(self.guards.rolling_back))
        return shapes | ({"guards": rolling} if rolling else {})

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
        """Reads a YAML file and `section.key=value` overrides (values are YAML). Raises ConfigError."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"config file {str(path)!r} is not UTF-8 text: {error}") from error
        data = _load_yaml(text, f"config file {str(path)!r}")
        if not isinstance(data, dict):
            raise ConfigError(f"config file {str(path)!r} must hold sections such as run: and model:")
        for override in overrides:
            _apply_override(data, override)
        return cls.parse(data)

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Config:
        """Validates a nested dict. Raises ConfigError listing every fault, one a line."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError("\n".join(_explain(item) for item in error.errors())) from error

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _RepeatedKeyError(yaml.YAMLError):
    """A mapping with a key twice; YAML forbids it, PyYAML keeps the last one."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that stands in a mapping twice. Merge keys (`<<`) may: they are no keys of the mapping's own."""

    def compose_mapping_node(self, anchor: dict[Any, Node]) -> MappingNode:
        mapping = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in mapping.value:
            if not isinstance(key, ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise _RepeatedKeyError(
                    f"line {line}: the key {key.value!r} stands there already, in line {seen[key.value]}; make one of "
                    "the two"
                )
            seen[key.value] = line
        return mapping


def _load_yaml(text: str, where: str) -> Any:
    """`where`: what the text is, for messages. Raises ConfigError."""
    try:
        return yaml.load(text, _UniqueKeyLoader)
    except _RepeatedKeyError as error:
        raise ConfigError(f"{where}, {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *parents, last = key.strip().split(".")
    node = data
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent} is a value, not a section")
        node = child
    node[last] = _load_yaml(value, f"override {override!r}: the value")


def _explain(item: Any) -> str:
    """One pydantic error as one line: the field, the value, what to do."""
    location = [str(part) for part in item["loc"] if not str(part).startswith(("tuple[", "literal["))]
    if item["type"] == "union_tag_invalid":
        tag = item["ctx"]["tag"]
        near = difflib.get_close_matches(tag, LOSS_BY_NAME, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else "docs/losses.md has them all"
        return f"loss.name is {tag!r}, which is no loss; {hint}"
    known = _keys_at(location[:-1]) if item["type"] == "extra_forbidden" else []
    if location[:1] == ["loss"]:
        location = [location[0], *location[3:]]  # without its place in a list and its name
    where = ".".join(location)
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return message if where == "" or where.split(".")[0] in message else f"{where}: {message}"
    return f"{where}: {message[0].lower()}{message[1:]} (got {item['input']!r})"


def _keys_at(location: list[str]) -> list[str]:
    if location[:1] == ["loss"]:
        return list(LOSS_BY_NAME[location[2]].model_fields)
    model: type[BaseModel] = Config
    for part in location:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
