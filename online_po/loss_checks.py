"""What losses, and what holds their beta, ask of the rest of the config: at parse time, and of the user's own losses
once they are loaded. Imports torch for those only."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from online_po.errors import ConfigError
from online_po.loss_configs import Custom, LossBase

if TYPE_CHECKING:
    from online_po.config import Config


def check_losses(config: Config) -> None:
    """Cross-checks of `loss`, `reference` and `beta_control`. Raises ValueError, as pydantic's validators do."""
    _check_kinds(config)
    _check_betas(config)
    _check_reference(config)
    _check_probabilities(config)
    _check_sampler_logps(config)
    _check_beta_control(config)


def _check_kinds(config: Config) -> None:
    first = config.loss[0]
    other = next((loss for loss in config.loss if loss.kind != first.kind), None)
    if other is not None:
        raise ValueError(
            f"loss mixes {first.name} ({first.kind}) and {other.name} ({other.kind}), but a round holds pairs or "
            "single labelled responses, not both; choose losses of one kind"
        )


def _check_betas(config: Config) -> None:
    for loss in config.loss:
        beta = getattr(loss, "beta", None)
        if isinstance(beta, tuple) and len(beta) != config.loop.rounds:
            raise ValueError(
                f"loss.beta of {loss.name} is a list of {len(beta)}, but loop.rounds is {config.loop.rounds}; give "
                "one for each round"
            )


def _check_reference(config: Config) -> None:
    reference, rounds = config.reference, config.loop.rounds
    # What a custom loss reads is known when it is loaded, see `check_custom_losses`.
    needing = [loss.name for loss in config.loss if loss.needs_reference and loss.name != "custom"]
    if needing and reference.kind == "none":
        raise ValueError(
            f"reference.kind is none, but loss.name: {needing[0]} needs a reference; use fixed, refresh, ema or kl"
        )
    if not any(loss.needs_reference for loss in config.loss) and reference.kind != "none":
        raise ValueError(
            f"reference.kind is {reference.kind}, but loss.name: {config.loss[0].name} has no use for a "
            "reference; leave section reference out, or set reference.kind: none"
        )
    if reference.every > rounds:
        raise ValueError(
            f"reference.every is {reference.every}, but loop.rounds is {rounds}: the reference would never change; "
            "lower it or set reference.kind: fixed"
        )


def _check_probabilities(config: Config) -> None:
    """Who gives, and who reads, the judge's probability that chosen beats rejected."""
    scale, pairs = config.judge.bradley_terry_scale, config.pairs
    if scale is not None and (config.example_kind == "labels" or pairs.strategy == "spin"):
        why = "pairs.strategy: spin, whose pairs no judge compares"
        if config.example_kind == "labels":
            why = f"loss.name: {config.loss[0].name}, which trains on single responses"
        raise ValueError(f"judge.bradley_terry_scale is {scale:g}, but has no effect with {why}; drop it")
    if not any(loss.needs_probabilities for loss in config.loss):
        return
    if pairs.strategy == "spin":
        raise ValueError(
            "loss.probability is soft, but pairs of pairs.strategy: spin have no probability from the judge; use "
            "loss.probability: hard, or another strategy"
        )
    if scale is None:
        raise ValueError(
            "loss.probability is soft, but judge.bradley_terry_scale is null: the judge gives no probability that "
            "chosen beats rejected; set it (1 for a reward model trained on pairs), or use loss.probability: hard"
        )
    if pairs.seed_path is not None:
        raise ValueError(
            f"loss.probability is soft, but pairs of pairs.seed_path {pairs.seed_path!r} have no probability from the "
            "judge; use loss.probability: hard, or drop pairs.seed_path and pairs.seed_share"
        )


def _check_sampler_logps(config: Config) -> None:
    if config.reference.logps == "learner":
        return
    if config.reference.kind != "refresh" or config.reference.every != 1 or config.loop.max_staleness:
        raise ValueError(
            "reference.logps is sampler, but the reference is not the policy that samples; set reference.kind: "
            "refresh with every: 1 and loop.max_staleness: 0, or reference.logps: learner"
        )
    others = {"strategy: spin": config.pairs.strategy == "spin"}
    others |= {name: bool(getattr(config.pairs, name)) for name in ("replay_share", "seed_share")}
    for name in (name for name, there in others.items() if there):
        raise ValueError(
            f"reference.logps is sampler, but with pairs.{name} not all responses are the sampler's; use "
            "reference.logps: learner"
        )
    parts = [loss.name for loss in config.loss if loss.name in ("ld_dpo", "kto", "custom")]
    if parts:
        raise ValueError(
            f"reference.logps is sampler, but loss.name: {parts[0]} may read more of the reference than whole "
            "responses' log-probabilities; use reference.logps: learner"
        )


def _check_beta_control(config: Config) -> None:
    control, reference = config.beta_control, config.reference
    if control is None:
        return
    if not any(loss.needs_reference and hasattr(loss, "beta") for loss in config.loss):
        raise ValueError(
            f"beta_control is set, but loss.name: {config.loss[0].name} has no beta against a reference; drop it, or "
            "use a loss that has one"
        )
    every = reference.refreshes_every
    if reference.kind == "none" or (every is not None and every <= 1 + config.loop.max_staleness):
        raise ValueError(
            f"beta_control is set, but with reference.kind: {reference.kind} the KL to the reference is not "
            "there, or starts from zero before it is measured; use reference.kind: fixed, or drop beta_control"
        )
    if config.loop.rounds == 1:
        raise ValueError(
            "beta_control is set, but loop.rounds is 1, and what a round measures sets the next one's beta; drop it, "
            "or run more rounds"
        )
    if reference.above is not None and control.target_kl >= reference.above:
        raise ValueError(
            f"beta_control.target_kl is {control.target_kl:g}, but at reference.above = {reference.above:g} the "
            "reference takes the policy's place, so that the target is not reached and beta only falls; lower the one "
            "or raise the other"
        )


def check_custom_losses(config: Config) -> None:
    """Loads the user's own losses and sees that what they read is there. Raises ConfigError."""
    custom = [loss for loss in config.loss if isinstance(loss, Custom)]
    if not custom:
        return
    from online_po.losses import loss_function, tensor_names  # torch, which no other check needs

    reads = any(name.startswith("reference_") for name in tensor_names(config.loss))
    if reads != (config.reference.kind != "none"):
        say = "reads the reference's log-probabilities" if reads else "reads nothing of a reference"
        do = "leave section reference out, or choose another kind" if reads else "set reference.kind: none"
        where = f"loss.function {custom[0].function!r}"
        raise ConfigError(f"reference.kind is {config.reference.kind}, but {where} {say}; {do}")
    given = tensor_names([loss for loss in config.loss if not isinstance(loss, Custom)])
    for loss in custom:
        where, names = f"loss.function {loss.function!r}", tensor_names(loss)
        for name in ("log_ratio_mean", "margin_mean"):
            if name in names - given:
                raise ConfigError(f"{where} reads {name}, which a custom loss is not given; drop that parameter")
        if "preference_probabilities" in names and config.judge.bradley_terry_scale is None:
            raise ConfigError(
                f"{where} reads preference_probabilities, but judge.bradley_terry_scale is null, so that the judge "
                "gives none; set it, or drop that parameter"
            )
        if "preference_probabilities" in names and config.pairs.seed_path is not None:
            raise ConfigError(
                f"{where} reads preference_probabilities, but pairs of pairs.seed_path {config.pairs.seed_path!r} have "
                "none; drop the one or the other"
            )
        if config.pairs.strategy == "spin" and reads_scores(loss):
            raise ConfigError(
                f"{where} reads scores, which pairs of pairs.strategy: spin do not have; drop those parameters, or "
                "choose another strategy"
            )
    held = [loss for loss in config.loss if loss.needs_reference and hasattr(loss, "beta")]
    takes = [loss for loss in held if "beta" in inspect.signature(loss_function(loss)).parameters]
    if config.beta_control is not None and not takes:
        raise ConfigError(
            f"beta_control is set, but loss.function {custom[0].function!r} takes no option beta; give "
            "it one, keyword-only, or drop beta_control"
        )


def reads_scores(loss: LossBase) -> bool:
    """Whether a loss reads the judge's scores; a custom one is loaded to find out. Raises ConfigError if it does not
    load."""
    if loss.name != "custom":
        return loss.needs_scores
    from online_po.losses import tensor_names

    return not tensor_names(loss).isdisjoint(("chosen_scores", "rejected_scores"))
