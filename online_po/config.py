"""The configuration of a run: YAML in, one validated object out. Imports neither torch nor ray.

Every cross-check of sections that needs no model happens here, at parse time. Checks that need the
tokenizer or the model's context are in `online_po.plan`.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError, model_validator

from online_po.errors import ConfigError
from online_po.example_checks import check_examples
from online_po.example_configs import LabelsConfig, PairsConfig
from online_po.guard_configs import GuardsConfig, check_guards
from online_po.judge_configs import (
    JUDGE_BY_KIND,
    JudgeBase,
    JudgeConfig,
    Member,
    RewardModel,
    Rules,
    self_judges,
    single_judges,
)
from online_po.loss_checks import check_losses
from online_po.loss_configs import LOSS_BY_NAME, LossBase, LossName, Sigmoid
from online_po.reference_configs import BetaControlConfig, ReferenceConfig
from online_po.sections import (
    CheckpointConfig,
    EvalConfig,
    GeneratorConfig,
    LearnerConfig,
    LimitsConfig,
    LoopConfig,
    ModelConfig,
    PromptsConfig,
    RayConfig,
    RunConfig,
    SamplingConfig,
    Section,
)
from online_po.yaml_text import apply_override, load_yaml

MODEL_KINDS = ("reward_model", "implicit")
"""Judges that hold a model."""

OTHER_NAMES = {
    "dpo": "sigmoid",
    "slic": "hinge",
    "robust": "rdpo",
    "sppo_hard": "sppo",
    "sigmoid_norm": "ln_dpo",
    "nll": "sft",
}
"""What other tools and papers call some losses."""

RENAMED = {"run.keep_checkpoints": "checkpoint.keep"}
"""Keys of earlier versions."""


def _as_list(value: Any) -> list[Any]:
    """One loss is a list of one; a loss without a name is DPO's. Raises ValueError for what is no list of losses."""
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, (list, tuple)) or not all(isinstance(loss, (dict, LossBase)) for loss in listed):
        raise ValueError(f"loss is {value!r}; write one as {{name: sigmoid, beta: 0.1}}, or a list of such")
    if not listed:
        raise ValueError("loss is an empty list; name a loss, or leave it out for DPO")
    return [{"name": "sigmoid", **loss} if isinstance(loss, dict) else loss for loss in listed]


class Config(Section):
    """One run."""

    run: RunConfig
    model: ModelConfig
    prompts: PromptsConfig
    loop: LoopConfig = LoopConfig()  # type: ignore[call-arg]
    generator: GeneratorConfig = GeneratorConfig()  # type: ignore[call-arg]
    judge: JudgeConfig = Rules()  # type: ignore[call-arg]
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
    checkpoint: CheckpointConfig = CheckpointConfig()  # type: ignore[call-arg]
    ray: RayConfig = RayConfig()  # type: ignore[call-arg]
    limits: LimitsConfig = LimitsConfig()  # type: ignore[call-arg]

    @model_validator(mode="before")
    @classmethod
    def _no_reference(cls, data: Any) -> Any:
        """Without a section `reference`, losses that need none get none."""
        try:
            names = [loss["name"] for loss in _as_list(data.get("loss", {})) if isinstance(loss, dict)]
        except ValueError:  # told of together with the other fields' faults
            return data
        known = [loss for name, loss in LOSS_BY_NAME.items() if name in names]
        if known and not any(loss.needs_reference for loss in known) and "reference" not in data:
            return data | {"reference": {"kind": "none"}}
        return data

    @model_validator(mode="after")
    def _check(self) -> Config:
        check_losses(self)
        check_examples(self)
        context = self.prompts.max_tokens + self.generator.max_tokens
        if self.generator.max_model_len is not None and self.generator.max_model_len < context:
            raise ValueError(
                f"generator.max_model_len is {self.generator.max_model_len}, below prompts.max_tokens + "
                f"generator.max_tokens = {context}; raise it or lower one of those"
            )
        if self.generator.engine == "transformers" and self.generator.tensor_parallel > 1:
            raise ValueError("generator.tensor_parallel above 1 needs generator.engine: vllm")
        if self.model.revision is not None and os.path.isdir(self.model.path):
            raise ValueError(
                f"model.revision is {self.model.revision!r}, but model.path is a local folder, which has none; drop it"
            )
        self._check_types()
        self._check_gpus()
        self._check_self_judges()
        self._refuse_inert()
        if self.loop.max_staleness >= self.loop.rounds:
            raise ValueError(
                f"loop.max_staleness is {self.loop.max_staleness} but loop.rounds is {self.loop.rounds}: no round "
                "would ever train on responses of a trained policy; lower the one or raise the other"
            )
        kept = self.checkpoint.keep
        if kept is not None and kept <= self.loop.max_staleness:
            raise ValueError(
                f"checkpoint.keep is {kept}, but with loop.max_staleness = {self.loop.max_staleness} older "
                f"weights are still sampled from; keep at least {self.loop.max_staleness + 1}"
            )
        check_guards(
            self.guards,
            keep=kept,
            max_staleness=self.loop.max_staleness,
            unmet=self._unmet_by_guards(),
        )
        if self.eval_sampling.temperature == 0 and self.eval.responses_per_prompt > 1:
            raise ValueError(
                f"eval.responses_per_prompt is {self.eval.responses_per_prompt}, but at temperature 0 all responses to "
                "a prompt would be the same; set it to 1, or eval.temperature above 0"
            )
        if self.eval.every == 0 and (self.prompts.heldout_path or self.prompts.heldout_size):
            raise ValueError("eval.every is 0 but held-out prompts are given; drop them or evaluate")
        if self.eval.every > 0 and not (self.prompts.heldout_path or self.prompts.heldout_size):
            raise ValueError(
                "no held-out prompts for evaluation: set prompts.heldout_path or prompts.heldout_size, or eval.every: 0"
            )
        return self

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
        if self.ray.judge_gpus and self.judge.kind not in (*MODEL_KINDS, "python", "plugin", "ensemble"):
            raise ValueError(
                f"ray.judge_gpus is {self.ray.judge_gpus:g}, but judge.kind: {self.judge.kind} computes nothing on a "
                "GPU; drop it"
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

    def _check_self_judges(self) -> None:
        """Judges that are the policy itself: they run where the generators are."""
        for judge in self_judges(self.judge):
            if self.judge.workers != 1:
                raise ValueError(
                    f"judge.workers is {self.judge.workers}, but judge.kind {judge.kind} asks the generators and "
                    "has no processes of its own; drop it, and see generator.replicas"
                )
            for name in ("judge_cpus", "judge_gpus"):
                if value := getattr(self.ray, name):
                    raise ValueError(
                        f"ray.{name} is {value:g}, but beside judge.kind {judge.kind} there are no judge processes: "
                        "all members of its ensemble run in the driver; drop it"
                    )
            for member in single_judges(self.judge):
                if isinstance(member, RewardModel) and member.engine == "vllm":
                    raise ValueError(
                        f"judge.members: a reward_model of engine vllm needs judge processes, but beside {judge.kind} "
                        "there are none; set its engine: transformers"
                    )
            if isinstance(judge.policy, int) and judge.policy >= self.loop.rounds:
                raise ValueError(
                    f"judge.policy is {judge.policy}, but loop.rounds is {self.loop.rounds}: no round is sampled by a "
                    "later policy; set it to current, or lower it"
                )

    def _refuse_inert(self) -> None:
        """A setting that would be ignored beside another one is refused, not ignored."""
        evaluation = ("responses_per_prompt", "temperature", "bootstrap_samples", "early_stop")
        vllm_only = ("cpu_kv_cache_gib", "gpu_memory_utilization", "enforce_eager", "lora")
        rules = [
            (self.pairs.strategy != "top_bottom_k", "pairs", ("k",), "pairs.strategy: top_bottom_k"),
            (self.labels.rule != "top_bottom", "labels", ("share",), "labels.rule: top_bottom"),
            (
                self.judge.kind == "ensemble",
                "judge",
                ("timeout_s", "concurrency"),
                "another judge.kind, or in a member",
            ),
            (self.generator.engine != "vllm", "generator", vllm_only, "generator.engine: vllm"),
            (self.learner.lora is None, "generator", ("lora",), "learner.lora"),
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

    def _unmet_by_guards(self) -> dict[str, str]:
        """Of guards that could never see anything: what they would need."""
        pairs, rounds = self.pairs, self.loop.rounds
        kl = self.reference.kind != "none" or self.measures_kl_to_start
        own = not (pairs.replay_share or pairs.seed_share or pairs.strategy == "spin") and self.example_kind == "pairs"
        several = "loop.rounds above 1: it compares with round 1"
        needs = {
            "kl": (kl, "a reference, or learner.kl_to_start: true"),
            "displacement": (own, "pairs of the round's own responses alone: no replay, seed pairs, spin or labels"),
            "over_optimisation": (self.eval.every > 0, "eval.every above 0"),
            "entropy": (rounds > 1, several),
            "diversity": (rounds > 1, several),
            "length": (rounds > 1, several),
            "length_score": (self.loop.responses_per_prompt > 1, "loop.responses_per_prompt above 1"),
            "flat": (rounds >= self.guards.flat.rounds, f"loop.rounds of {self.guards.flat.rounds} or more"),
        }
        return {name: what for name, (met, what) in needs.items() if not met}

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
        """Everything that shapes the run's results. Where it lies, what it runs on and with how much memory, and bounds
        that stop it may differ between two starts.

        Model, prompts, seed pairs and what the judge reads are compared by content, see `Ledger.require_same`: prompts
        and pairs by a hash of all they say and of their tokens, the model by its config and the sizes of its weights,
        then by a probe, the judge by `JudgeBase.identity`."""
        shapes = self.model_dump(
            mode="json",
            exclude={
                "ray": True,
                "checkpoint": True,
                "limits": True,
                # Guards that roll back are added below: others only tell, or end the run.
                "guards": True,
                "eval": {"early_stop"},
                "run": {"name", "dir", "tensorboard", "grace_s"},
                "model": {"path", "revision"},
                "prompts": {"path", "dataset", "subset", "split", "heldout_path"},
                "pairs": {"seed_path"},
                "generator": {
                    "replicas",
                    "threads",
                    "gpu_memory_utilization",
                    "cpu_kv_cache_gib",
                    "sync_tolerance",
                    "lora",
                }
                # What is lowered where memory runs out: a run goes on with less. To a policy that judges, the context
                # says which questions are too long.
                | {"max_num_seqs"}
                | (set() if self_judges(self.judge) else {"max_model_len"}),
                "judge": True,
                "learner": {"threads", "micro_batch_tokens", "gradient_checkpointing", "prefix_sharing"},
            },
        )
        rolling = self.guards.model_dump(mode="json", include=set(self.guards.rolling_back))
        judge = self.judge.settings() | self.judge.model_dump(mode="json", include={"length", "bradley_terry_scale"})
        return shapes | {"judge": judge} | ({"guards": rolling} if rolling else {})

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
        """Reads a YAML file and `section.key=value` overrides (values are YAML). Raises ConfigError."""
        return cls.parse(_read(path, overrides))

    @classmethod
    def parse(cls, data: dict[str, Any]) -> Config:
        """Validates a nested dict. Raises ConfigError listing every fault, one a line."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError(_explain_all(error)) from error

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _JudgeAlone(Section):
    judge: JudgeConfig


def read_judge(path: str | Path, overrides: Sequence[str] = ()) -> JudgeBase:
    """Section `judge` of a YAML file, whatever else is in it. Raises ConfigError."""
    data = _read(path, overrides)
    if "judge" not in data:
        raise ConfigError(f"config file {str(path)!r} has no section judge:")
    try:
        return _JudgeAlone.model_validate({"judge": data["judge"]}).judge
    except ValidationError as error:
        raise ConfigError(_explain_all(error)) from error


def _read(path: str | Path, overrides: Sequence[str]) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {str(path)!r} is not UTF-8 text: {error}") from error
    data = load_yaml(text, f"config file {str(path)!r}")
    if not isinstance(data, dict):
        raise ConfigError(f"config file {str(path)!r} must hold sections such as run: and model:")
    for override in overrides:
        apply_override(data, override)
    return data


def _explain_all(error: ValidationError) -> str:
    """Every fault, one a line."""
    items = error.errors()
    # A list of which an entry is at fault counts as too short as well.
    places = {item["loc"][: len(item["loc"]) - cut] for item in items for cut in range(1, len(item["loc"]))}
    return "\n".join(_explain(item) for item in items if item["type"] != "too_short" or item["loc"] not in places)


def _explain(item: Any) -> str:
    """One pydantic error as one line: the field, the value, what to do."""
    location = [str(part) for part in item["loc"] if not str(part).startswith(("tuple[", "literal["))]
    if item["type"].startswith("union_tag") and location[:1] == ["judge"]:
        return _explain_kind(".".join(_as_written(location)), item)
    if item["type"] == "union_tag_invalid":
        tag = item["ctx"]["tag"]
        near = [*filter(None, [OTHER_NAMES.get(tag.lower())])] or difflib.get_close_matches(tag, LOSS_BY_NAME, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else "docs/losses.md has them all"
        return f"loss.name is {tag!r}, which is no loss; {hint}"
    known = _keys_at(location[:-1]) if item["type"] == "extra_forbidden" else []
    if location[:1] == ["loss"]:
        location = [location[0], *location[3:]]  # without its place in a list and its name
    if location[:1] == ["judge"]:
        of_kind = location[-2:-1] and location[-2] in JUDGE_BY_KIND
        location = _as_written(location)
    where = ".".join(location)
    if item["type"] == "extra_forbidden":
        if location[:1] == ["judge"] and of_kind and (kinds := _kinds_with(location[-1])):
            return f"{where} is for judge.kind: {' and '.join(kinds)}; drop it, or set the kind"
        if where in RENAMED:
            return f"{where}: unknown key; it is {RENAMED[where]} now"
        near = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{where}: required, but not given"
    if item["type"] == "too_short":
        return f"{where}: {item['ctx']['min_length']} or more are needed, but there is {item['ctx']['actual_length']}"
    if item["type"] == "tuple_type":
        return f"{where} is {item['input']!r}, but it is a list; write it as one"
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"{where} is {item['input']!r}, but it is a section; give keys below it, or leave it out"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        named = where.split(".")[0] in message and ".members." not in where
        return message if where == "" or named else f"{where}: {message}"
    return f"{where}: {message[0].lower()}{message[1:]} (got {item['input']!r})"


def _explain_kind(where: str, item: Any) -> str:
    """A judge of a kind that is none, or, of an ensemble's member, without a kind."""
    member = ".members." in where
    kinds = [kind for kind in JUDGE_BY_KIND if not (member and kind == "ensemble")]
    if item["type"] == "union_tag_not_found":
        return f"{where}.kind: required, but not given; there are {', '.join(kinds)}"
    tag = item["ctx"]["tag"]
    if tag in JUDGE_BY_KIND:
        return f"{where}.kind is {tag!r}, but no ensemble is a member of another; list its members one by one"
    near = difflib.get_close_matches(tag, kinds, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(kinds)}"
    return f"{where}.kind is {tag!r}, which is no judge; {hint}"


def _as_written(location: list[str]) -> list[str]:
    """A place in section `judge` without kinds, and without a member's own key `judge`, which a person leaves out."""
    return ["judge", *(part for part in location[1:] if part not in JUDGE_BY_KIND and part != "judge")]


def _kinds_with(key: str) -> list[str]:
    return [kind for kind, judge in JUDGE_BY_KIND.items() if key in judge.model_fields]


def _keys_at(location: list[str]) -> list[str]:
    if location[:1] == ["loss"]:
        return list(LOSS_BY_NAME[location[2]].model_fields)
    model: type[BaseModel] = Config
    if location[:1] == ["judge"]:
        kind = max(place for place, part in enumerate(location) if part in JUDGE_BY_KIND)
        member, model, location = kind > 1, JUDGE_BY_KIND[location[kind]], location[kind + 1 :]
        if member and not location:
            return ["weight", "min_gap", *(name for name in model.model_fields if name not in JudgeBase.RUN_FIELDS)]
        if location[:1] == ["members"]:
            return list(Member.model_fields)
    for part in location:
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)
