"""Every loss once more, in float64 numpy, written from the papers and apart from `online_po.losses`.

FORMULAS[name](x, base, **options) -> (B,): x holds the inputs by name, base the same inputs where gradients are taken:
what a loss treats as constant (weights, running means, the batch's beta) is computed from base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Inputs = dict[str, np.ndarray]


def s(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def ratios(x: Inputs) -> tuple[np.ndarray, np.ndarray]:
    return x["chosen_logps"] - x["reference_chosen_logps"], x["rejected_logps"] - x["reference_rejected_logps"]


def margin(x: Inputs) -> np.ndarray:
    a, b = ratios(x)
    return a - b


def sigmoid(x, base, beta):
    return np.log(1 + np.exp(-beta * margin(x)))


def cdpo(x, base, beta, label_smoothing):
    p = s(beta * margin(x))
    return -(1 - label_smoothing) * np.log(p) - label_smoothing * np.log(1 - p)


def rdpo(x, base, beta, label_smoothing):
    p = s(beta * margin(x))
    e = label_smoothing
    return ((1 - e) * -np.log(p) - e * -np.log(1 - p)) / (1 - 2 * e)


def ipo(x, base, beta, average_logps):
    a, b = ratios(x)
    if average_logps:
        a, b = a / x["chosen_lengths"], b / x["rejected_lengths"]
    return np.square(a - b - 0.5 / beta)


def hinge(x, base, beta):
    return np.maximum(0, 1 - beta * margin(x))


def exo_pair(x, base, beta, label_smoothing):
    p = s(beta * margin(x))
    return p * np.log(p / (1 - label_smoothing)) + (1 - p) * np.log((1 - p) / label_smoothing)


def nca_pair(x, base, beta):
    a, b = ratios(x)
    return -np.log(s(beta * a)) - 0.5 * (np.log(s(-beta * a)) + np.log(s(-beta * b)))


def bco_pair(x, base, beta):
    a, b = ratios(x)
    d = x["log_ratio_mean"] if "log_ratio_mean" in x else np.concatenate(ratios(base)).mean()
    return -np.log(s(beta * (a - d))) - np.log(1 - s(beta * (b - d)))


def sppo(x, base, beta, probability):
    a, b = ratios(x)
    wins = 1.0 if probability == "hard" else x["preference_probabilities"]
    eta = 1 / beta
    return (a - eta * (wins - 0.5)) ** 2 + (b - eta * ((1 - wins) - 0.5)) ** 2


def aot(x, base, beta):
    u = x["chosen_logps"] - x["rejected_logps"]
    v = np.sort(x["reference_chosen_logps"] - x["reference_rejected_logps"])
    rank = (u[:, None] > u[None, :]).sum(1)
    return np.log(1 + np.exp(-beta * (u - v[rank])))


def aot_unpaired(x, base, beta):
    a, b = ratios(x)
    rank = (a[:, None] > a[None, :]).sum(1)
    return np.log(1 + np.exp(-beta * (a - np.sort(b)[rank])))


def apo_zero(x, base, beta):
    a, b = ratios(x)
    return 1 - s(beta * a) + s(beta * b)


def apo_down(x, base, beta):
    a, b = ratios(x)
    return s(beta * a) + 1 - s(beta * a - beta * b)


def discopop(x, base, beta, tau):
    z = beta * margin(x)
    blend = s(z / tau)
    return (1 - blend) * -np.log(s(z)) + blend * np.exp(-z)


def ln_dpo(x, base, beta):
    a, b = ratios(x)
    return -np.log(s(beta / x["chosen_lengths"] * a - beta / x["rejected_lengths"] * b))


def ld_dpo(x, base, beta, alpha):
    def mixed(name: str) -> np.ndarray:
        whole, prefix = x[f"{name}_logps"], x[f"{name}_prefix_logps"]
        return (1 - alpha) * prefix + alpha * whole

    a = mixed("chosen") - mixed("reference_chosen")
    b = mixed("rejected") - mixed("reference_rejected")
    return -np.log(s(beta * a - beta * b))


def r_dpo(x, base, beta, alpha):
    a, b = ratios(x)
    return -np.log(s(beta * a + alpha * x["chosen_lengths"] - (beta * b + alpha * x["rejected_lengths"])))


def dpop(x, base, beta, penalty):
    falls = np.maximum(0, x["reference_chosen_logps"] - x["chosen_logps"])
    return -np.log(s(beta * (margin(x) - penalty * falls)))


def odpo(x, base, beta, alpha, transform):
    gap = x["chosen_scores"] - x["rejected_scores"]
    return -np.log(s(beta * margin(x) - alpha * (np.log(gap) if transform == "log" else gap)))


def madpo(x, base, beta, amplify, dampen, threshold, steepness):
    h = x["chosen_scores"] - x["rejected_scores"]
    k = (amplify - 1) / (1 - dampen)
    c = dampen + (amplify - dampen) / (1 + k * np.exp(steepness * (np.abs(h) - threshold)))
    weight = np.where(h > -threshold, s(c * h) / s(h), 1)
    return weight * -np.log(s(beta * margin(x)))


def beta_dpo(x, base, beta, alpha, keep):
    m0 = margin(base)
    centre = x["margin_mean"] if "margin_mean" in x else m0.mean()
    count = max(1, round(keep * len(m0)))
    kept = np.argsort(np.abs(m0 - centre))[:count]
    own_beta = max(1e-3, beta + alpha * beta * (m0[kept].mean() - centre))
    losses = np.zeros(len(m0))
    losses[kept] = -np.log(s(own_beta * margin(x)))[kept] * len(m0) / count
    return losses


def wpo(x, base, beta):
    weight = np.minimum(1, np.exp(base["chosen_weight_logps"]) * np.exp(base["rejected_weight_logps"]))
    return weight * -np.log(s(beta * margin(x)))


def f_dpo(x, base, beta, divergence, alpha):
    u, v = (np.exp(ratio) for ratio in ratios(x))
    slope: Callable[[np.ndarray], np.ndarray] = {
        "reverse_kl": lambda t: np.log(t) + 1,
        "forward_kl": lambda t: -1 / t,
        "js": lambda t: np.log(2 * t / (1 + t)),
        "alpha": lambda t: (1 - t ** -(alpha or 1)) / (alpha or 1),
    }[divergence]
    return -np.log(s(beta * slope(u) - beta * slope(v)))


def xpo(x, base, beta, alpha):
    return sigmoid(x, base, beta) + alpha * np.mean([x["chosen_logps"], x["rejected_logps"]], axis=0)


def simpo(x, base, beta, gamma):
    chosen, rejected = x["chosen_logps"] / x["chosen_lengths"], x["rejected_logps"] / x["rejected_lengths"]
    return -np.log(s(beta * chosen - beta * rejected - gamma))


def orpo(x, base, odds_weight):
    chosen, rejected = (np.exp(x[f"{name}_logps"] / x[f"{name}_lengths"]) for name in ("chosen", "rejected"))
    odds_ratio = (chosen / (1 - chosen)) / (rejected / (1 - rejected))
    return -np.log(chosen) + odds_weight * -np.log(s(np.log(odds_ratio)))


def cpo(x, base, beta, nll_weight):
    likelihood = -x["chosen_logps"] / x["chosen_lengths"]
    return -np.log(s(beta * x["chosen_logps"] - beta * x["rejected_logps"])) + nll_weight * likelihood


def alphapo(x, base, beta, gamma, alpha):
    p, q = (np.exp(x[f"{name}_logps"] / x[f"{name}_lengths"]) for name in ("chosen", "rejected"))
    return -np.log(s(-beta / alpha * p**-alpha + beta / alpha * q**-alpha - gamma))


def sft(x, base, average_logps):
    return -x["chosen_logps"] / (x["chosen_lengths"] if average_logps else 1)


def weights(x: Inputs, desirable_weight: float, undesirable_weight: float) -> np.ndarray:
    return np.array([desirable_weight if good else undesirable_weight for good in x["desirable"]])


def kto(x, base, beta, desirable_weight, undesirable_weight):
    a = x["logps"] - x["reference_logps"]
    value = np.where(x["desirable"], s(beta * (a - x["kl"])), s(beta * (x["kl"] - a)))
    return weights(x, desirable_weight, undesirable_weight) * (1 - value)


def apo_zero_unpaired(x, base, beta, desirable_weight, undesirable_weight):
    p = s(beta * (x["logps"] - x["reference_logps"]))
    return weights(x, desirable_weight, undesirable_weight) * np.where(x["desirable"], 1 - p, p)


def bco(x, base, beta, desirable_weight, undesirable_weight):
    a = x["logps"] - x["reference_logps"]
    d = x["log_ratio_mean"] if "log_ratio_mean" in x else (base["logps"] - base["reference_logps"]).mean()
    p = s(beta * (a - d))
    return weights(x, desirable_weight, undesirable_weight) * -np.log(np.where(x["desirable"], p, 1 - p))


FORMULAS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        *(sigmoid, cdpo, rdpo, ipo, hinge, exo_pair, nca_pair, bco_pair, sppo, aot, aot_unpaired, apo_zero, apo_down),
        *(discopop, ln_dpo, ld_dpo, r_dpo, dpop, odpo, madpo, beta_dpo, wpo, f_dpo, xpo, simpo, orpo, cpo, alphapo),
        *(sft, kto, apo_zero_unpaired, bco),
    )
}
