"""From a loss's config to its losses: tensors by the names of the function's parameters, options from the config."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from online_po.errors import ConfigError
from online_po.loss_configs import Custom, LossBase, Sppo
from online_po.losses import paired, reference_free, shaped, unpaired
from online_po.losses.inputs import LossInputs, UnpairedInputs
from online_po.user_code import load_function

LossFunction = Callable[..., Tensor]

FUNCTIONS: dict[str, LossFunction] = {
    function.__name__: function
    for function in (
        paired.sigmoid,
        paired.cdpo,
        paired.rdpo,
        paired.ipo,
        paired.hinge,
        paired.exo_pair,
        paired.nca_pair,
        paired.bco_pair,
        paired.sppo,
        shaped.aot,
        shaped.aot_unpaired,
        paired.apo_zero,
        paired.apo_down,
        paired.discopop,
        shaped.ln_dpo,
        shaped.ld_dpo,
        shaped.r_dpo,
        shaped.dpop,
        shaped.odpo,
        shaped.madpo,
        shaped.beta_dpo,
        shaped.wpo,
        shaped.f_dpo,
        shaped.xpo,
        reference_free.simpo,
        reference_free.orpo,
        reference_free.cpo,
        reference_free.alphapo,
        reference_free.sft,
        unpaired.kto,
        unpaired.apo_zero_unpaired,
        unpaired.bco,
    )
}
"""Every loss but `custom`, by its name in a config."""

Beta = float | Sequence[float | None] | None


def pair_losses(config: LossBase | Sequence[LossBase], inputs: LossInputs, beta: Beta = None) -> Tensor:
    """(B,) losses of B pairs under a loss, or the weighted sum of several.

    beta: what a schedule says in place of `config.beta`; for a list of losses, one for all that have a beta, or one
    each (None: as configured). Raises ConfigError where an input that a loss needs is not given, or a loss is unpaired.
    """
    return _losses(config, inputs, beta)


def unpaired_losses(config: LossBase | Sequence[LossBase], inputs: UnpairedInputs, beta: Beta = None) -> Tensor:
    """(B,) losses of B single responses, as `pair_losses` of pairs."""
    return _losses(config, inputs, beta)


def tensor_names(config: LossBase | Sequence[LossBase]) -> frozenset[str]:
    """Fields of LossInputs (or UnpairedInputs) that the losses read. Raises ConfigError as `loss_function` does.

    Running means (`log_ratio_mean`, `margin_mean`) are among them, though a loss does without.
    """
    names: set[str] = set()
    for loss in _listed(config):
        taken = set(tensor_parameters(loss_function(loss)))
        if isinstance(loss, Sppo) and not loss.needs_probabilities:
            taken.remove("preference_probabilities")
        names |= taken
    return frozenset(names)


def loss_function(config: LossBase) -> LossFunction:
    """The function of a loss; a custom one is loaded and its parameters checked.

    Raises ConfigError if a custom function does not load, or has parameters that nothing can fill, or takes no value
    that the config gives.
    """
    if not isinstance(config, Custom):
        return FUNCTIONS[config.name]
    function = load_function(config.function, setting="loss.function")
    _check_custom(config, function)
    return function


def _listed(config: LossBase | Sequence[LossBase]) -> Sequence[LossBase]:
    return [config] if isinstance(config, LossBase) else config


def _losses(config: LossBase | Sequence[LossBase], inputs: LossInputs | UnpairedInputs, beta: Beta) -> Tensor:
    losses = _listed(config)
    betas = beta if isinstance(beta, Sequence) else [beta] * len(losses)
    if not losses:
        raise ConfigError("loss is an empty list; name at least one loss")
    if len(betas) != len(losses):
        raise ConfigError(f"{len(betas)} betas were given for {len(losses)} losses; give one each, or one for all")
    kind = "paired" if isinstance(inputs, LossInputs) else "unpaired"
    total: Tensor | None = None
    for loss, own_beta in zip(losses, betas, strict=True):
        if loss.kind != kind:
            raise ConfigError(f"loss.name is {loss.name}, which is {loss.kind}, but the data are {kind}")
        weighted = loss.weight * _one(loss, inputs, own_beta)
        total = weighted if total is None else total + weighted
    assert total is not None
    return total


def _one(loss: LossBase, inputs: LossInputs | UnpairedInputs, beta: float | None) -> Tensor:
    function = loss_function(loss)
    tensors: dict[str, Tensor] = {}
    for name, parameter in tensor_parameters(function).items():
        value = getattr(inputs, name)
        if value is not None:
            tensors[name] = value
        elif parameter.default is inspect.Parameter.empty:
            raise ConfigError(f"loss.name is {loss.name}, which needs {name}; they were not given")
    options = _options(loss, function)
    if beta is not None and "beta" in options:
        options["beta"] = beta
    if isinstance(options.get("beta"), tuple):
        raise ConfigError(f"loss.beta is a list of one for each round ({loss.beta}); say which round's is meant")  # type: ignore[attr-defined]
    losses = function(**tensors, **options)
    if isinstance(loss, Custom) and isinstance(inputs, LossInputs) and losses.shape != inputs.chosen_logps.shape:
        raise ConfigError(
            f"loss.function is {loss.function!r}, which gave a tensor of shape {tuple(losses.shape)} for "
            f"{len(inputs.chosen_logps)} pairs; it must give one loss a pair"
        )
    return losses


def tensor_parameters(function: LossFunction) -> dict[str, inspect.Parameter]:
    """The parameters of a loss that are tensors, by name; the keyword-only ones are options."""
    parameters = inspect.signature(function).parameters.items()
    return {name: p for name, p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD}


def _options(loss: LossBase, function: LossFunction) -> dict[str, Any]:
    if isinstance(loss, Custom):
        takes_beta = "beta" in inspect.signature(function).parameters
        return {**loss.options, "beta": loss.beta} if takes_beta else dict(loss.options)
    return {name: getattr(loss, name) for name in type(loss).model_fields if name not in ("name", "weight")}


def _check_custom(config: Custom, function: LossFunction) -> None:
    where = f"loss.function is {config.function!r}"
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:
        raise ConfigError(f"{where}, whose parameters cannot be read; wrap it in a Python function") from error
    fields = [field.name for field in dataclasses.fields(LossInputs)]
    options: set[str] = set()
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            options.add(name)
            if name != "beta" and name not in config.options and parameter.default is inspect.Parameter.empty:
                raise ConfigError(f"{where}, whose option {name!r} has no value; give it in loss.options")
        elif parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD or name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(
                f"{where}, whose parameter {name!r} is no input of a loss; {hint} (options stand after a *)"
            )
    if "beta" in config.model_fields_set and "beta" not in options:
        raise ConfigError(f"{where}, which takes no option beta, but loss.beta is {config.beta}; drop it")
    unknown = sorted(config.options.keys() - (options - {"beta"}))
    if unknown:
        known = ", ".join(sorted(options - {"beta"})) or "none"
        raise ConfigError(f"loss.options has {unknown[0]!r}, but the options of {config.function!r} are: {known}")
