"""What compare_trl.py compares: pairs of settings, ours and TRL's, on fixed batches; needs neither torch nor TRL."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any, Literal

from online_po.loss_configs import LOSS_BY_NAME, LossBase

EOS, FIRST_WORD, VOCABULARY = 2, 4, 384
BatchName = Literal["ragged", "even", "greedy"]
Pair = tuple[list[int], list[int], list[int]]
"""Token ids of prompt, chosen and rejected response."""


def ragged_batch() -> list[Pair]:
    """Six pairs of random tokens and lengths; responses end with EOS, but for two that were cut off."""
    rng = random.Random(3)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randrange(FIRST_WORD, VOCABULARY) for _ in range(rng.randint(least, most))]

    pairs = [(tokens(3, 9), [*tokens(2, 13), EOS], [*tokens(2, 13), EOS]) for _ in range(6)]
    pairs[2][1].pop()
    pairs[4][2].pop()
    return pairs


def even_batch() -> list[Pair]:
    """The same, but prompts of one token and chosen responses of one length: means over tokens are then means over
    responses, and the prompt has no token that a loss could count."""
    return [(prompt[:1], [*(chosen * 4)[:7], EOS], rejected) for prompt, chosen, rejected in ragged_batch()]


RAGGED = ragged_batch()
PER_TOKEN = len(RAGGED) / sum(len(chosen) for _, chosen, _ in RAGGED)
"""Weight that turns a mean over pairs of summed logps into a mean over the ragged batch's chosen tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One loss of ours beside one of TRL's."""

    ours: tuple[LossBase, ...]
    trainer: str
    """A key of trl_theirs.CONFIGS."""
    settings: dict[str, Any]
    """Options of TRL's config."""
    note: str = ""
    """What makes the two equal, where it is not the default; or why they differ."""
    agrees: bool = True
    batch: BatchName = "ragged"
    one_by_one: bool = False
    """Whether TRL gets every pair as a batch of its own."""
    inputs: dict[str, float] = field(default_factory=dict)
    """Running means that our loss takes instead of the batch's."""
    kl_offset: int = 1
    """kto: the KL is estimated from prompt i with response i + kl_offset."""

    @property
    def ours_text(self) -> str:
        given = [f"{name} {value:g}" for name, value in self.inputs.items()]
        if self.kl_offset != 1:
            given.append(f"KL from response i {self.kl_offset:+d}")
        return ", ".join([" + ".join(map(_show, self.ours)), *given])

    @property
    def trl_text(self) -> str:
        return ", ".join([f"{self.trainer}Trainer", *(f"{name}={value}" for name, value in self.settings.items())])


def _show(loss: LossBase) -> str:
    options = [(name, getattr(loss, name)) for name in sorted(loss.model_fields_set - {"name"})]
    texts = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in options]
    return f"{loss.name} ({', '.join(texts)})" if texts else str(loss.name)


def our(name: str, **options: Any) -> LossBase:
    return LOSS_BY_NAME[name](**options)


def dpo(loss_type: str, ours: LossBase, note: str = "", **more: Any) -> Case:
    """A case of DPOTrainer with one loss type; `more`: TRL's options, or fields of Case."""
    fields = {name: more.pop(name) for name in ("agrees", "batch", "one_by_one", "inputs") if name in more}
    return Case(ours=(ours,), trainer="DPO", settings={"loss_type": [loss_type], **more}, note=note, **fields)


SUMMED_SFT = our("sft", average_logps=False, weight=PER_TOKEN)
AS_TOKENS = "`sft` summed, its weight chosen so that on this batch it is the mean over tokens."
EVEN = "Even batch, where the mean over tokens is the mean over responses."
NO_SHIFT = "The shift set to 0: TRL has none."

AGREEING: tuple[Case, ...] = (
    dpo("sigmoid", our("sigmoid")),
    dpo("sigmoid", our("sigmoid", beta=0.5), beta=0.5),
    dpo(
        "aot",
        our("cdpo", label_smoothing=0.1),
        "TRL dropped label smoothing from `sigmoid`, but has it in `aot`, which is DPO for a batch of one pair.",
        label_smoothing=0.1,
        one_by_one=True,
    ),
    dpo("robust", our("rdpo", label_smoothing=0.1), label_smoothing=0.1),
    dpo("ipo", our("ipo"), "Both average log-ratios over tokens."),
    dpo("hinge", our("hinge")),
    dpo("exo_pair", our("exo_pair", label_smoothing=1e-3), label_smoothing=1e-3),
    dpo("nca_pair", our("nca_pair")),
    dpo("bco_pair", our("bco_pair"), NO_SHIFT, inputs={"log_ratio_mean": 0.0}),
    dpo("sppo_hard", our("sppo", beta=1e-3), beta=1e-3),
    dpo("aot", our("aot")),
    dpo("aot_unpaired", our("aot_unpaired")),
    dpo("apo_zero", our("apo_zero")),
    dpo("apo_down", our("apo_down")),
    dpo("discopop", our("discopop", beta=0.05, tau=0.05), beta=0.05, discopop_tau=0.05),
    dpo("sigmoid_norm", our("ln_dpo", beta=5.0), beta=5.0),
    dpo("sigmoid", our("ld_dpo", alpha=0.5), ld_alpha=0.5),
    dpo("sigmoid", our("wpo"), "No weight of this batch is above 1, where ours stops.", use_weighting=True),
    dpo("sigmoid", our("f_dpo", divergence="reverse_kl"), f_divergence_type="reverse_kl"),
    dpo("sigmoid", our("f_dpo", divergence="forward_kl"), f_divergence_type="forward_kl"),
    dpo("sigmoid", our("f_dpo", divergence="js"), f_divergence_type="js_divergence"),
    dpo(
        "sigmoid",
        our("f_dpo", divergence="alpha", alpha=0.3),
        "TRL's coefficient is 1 - alpha.",
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.7,
    ),
    dpo("sft", SUMMED_SFT, AS_TOKENS),
    dpo("sft", our("sft"), EVEN, batch="even"),
    Case(
        ours=(our("sigmoid"), SUMMED_SFT),
        trainer="DPO",
        settings={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]},
        note=f"Iterative RPO. {AS_TOKENS}",
    ),
    Case(
        ours=(our("sigmoid", weight=0.8), our("bco_pair", weight=0.2), SUMMED_SFT),
        trainer="DPO",
        settings={"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        note=f"MPO. {NO_SHIFT} {AS_TOKENS}",
        inputs={"log_ratio_mean": 0.0},
    ),
    Case(ours=(our("cpo"),), trainer="CPO", settings={"loss_type": "sigmoid"}, batch="even", note=EVEN),
    Case(
        ours=(our("cpo", nll_weight=0.0),), trainer="CPO", settings={"loss_type": "sigmoid", "cpo_alpha": 0.0}, note=""
    ),
    Case(
        ours=(our("simpo", beta=2.0, gamma=1.0),),
        trainer="CPO",
        settings={"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0},
        note="cpo_alpha=0 takes CPO's likelihood term out.",
    ),
    Case(
        ours=(our("alphapo", beta=2.5, gamma=0.1, alpha=0.25),),
        trainer="CPO",
        settings={"loss_type": "alphapo", "beta": 2.5, "simpo_gamma": 0.1, "alpha": 0.25},
        note="gamma stands outside of beta in both: beta (R(c) - R(r)) - gamma.",
    ),
    Case(
        ours=(our("orpo"),),
        trainer="ORPO",
        settings={"beta": 0.1},
        batch="even",
        note="Even batch: TRL's likelihood term is a mean over tokens, the prompt's among them.",
    ),
    Case(
        ours=(our("cpo"),),
        trainer="TPO",
        settings={"loss_type": "sigmoid", "beta": 0.1, "tpo_alpha": 1.0},
        batch="even",
        note=f"The third response of TPO set to the chosen one. {EVEN}",
    ),
    Case(
        ours=(our("simpo", beta=2.0, gamma=1.0),),
        trainer="TPO",
        settings={"loss_type": "tpo-l", "beta": 2.0, "tpo_l_gamma": 1.0, "tpo_alpha": 0.0},
        note="tpo_alpha=0 takes the third response out.",
    ),
    Case(ours=(our("sigmoid"),), trainer="OnlineDPO", settings={"loss_type": "sigmoid", "beta": [0.1]}),
    Case(
        ours=(our("ipo", average_logps=False),),
        trainer="OnlineDPO",
        settings={"loss_type": "ipo", "beta": [0.1]},
        note="This trainer sums log-ratios where DPOTrainer averages them.",
    ),
    Case(
        ours=(our("kto"),),
        trainer="KTO",
        settings={"loss_type": "kto"},
        note="The KL from prompt i with response i - 1, as TRL has it.",
        kl_offset=-1,
    ),
    Case(
        ours=(our("kto", desirable_weight=1.3, undesirable_weight=0.6),),
        trainer="KTO",
        settings={"loss_type": "kto", "desirable_weight": 1.3, "undesirable_weight": 0.6},
        note="The KL from prompt i with response i - 1, as TRL has it.",
        kl_offset=-1,
    ),
    Case(ours=(our("apo_zero_unpaired"),), trainer="KTO", settings={"loss_type": "apo_zero_unpaired"}),
)
"""Every loss that both have, with the settings that make the two the same function."""

DIFFERING: tuple[Case, ...] = (
    dpo(
        "sft",
        our("sft"),
        "TRL takes the mean over the tokens of a batch, so a long response counts more, and how pairs are cut into "
        "micro-batches matters. Ours is the mean over responses of their means over tokens, which no cut changes.",
        agrees=False,
    ),
    dpo(
        "bco_pair",
        our("bco_pair"),
        "TRL leaves the paper's shift out (its running mean of rewards went with an earlier version). Ours shifts by "
        "the running mean, here the batch's.",
        agrees=False,
    ),
    dpo(
        "sigmoid",
        our("wpo"),
        "On responses that the policy itself finds likeliest the weights pass 1. Ours stops there, as the authors' "
        "code does (and earlier versions of TRL did).",
        agrees=False,
        batch="greedy",
        use_weighting=True,
    ),
    dpo(
        "sigmoid",
        our("f_dpo", divergence="alpha", alpha=0.3),
        "The same number given to both: ours is the paper's alpha, f' = (1 - u^-alpha) / alpha; TRL has "
        "(u^(c-1) - 1) / (c - 1), so c = 1 - alpha. They meet at TRL's default 0.5.",
        agrees=False,
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.3,
    ),
    Case(
        ours=(our("ipo"),),
        trainer="OnlineDPO",
        settings={"loss_type": "ipo", "beta": [0.1]},
        note="TRL averages over tokens in DPOTrainer and sums in OnlineDPOTrainer. Ours averages, as the paper's "
        "authors do, and sums where average_logps is false.",
        agrees=False,
    ),
    Case(
        ours=(our("cpo"),),
        trainer="CPO",
        settings={"loss_type": "sigmoid"},
        note="The likelihood term: TRL's mean over the tokens of a batch, our mean over responses.",
        agrees=False,
    ),
    Case(
        ours=(our("simpo", beta=2.0, gamma=1.0),),
        trainer="CPO",
        settings={"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
        note="CPOTrainer adds CPO's likelihood term unless cpo_alpha is 0. Ours is the paper's SimPO; for the sum, "
        "use a mixture with sft.",
        agrees=False,
    ),
    Case(
        ours=(our("orpo"),),
        trainer="ORPO",
        settings={"beta": 0.1},
        note="The likelihood term: TRL's is over prompt and response, a mean over the tokens of a batch. Ours is over "
        "response tokens, a mean over responses.",
        agrees=False,
    ),
    Case(
        ours=(our("kto"),),
        trainer="KTO",
        settings={"loss_type": "kto"},
        note="The KL's estimate: the paper pairs prompt i with response i + 1 of the batch, and so do we; TRL takes "
        "response i - 1. Both are estimates of the same KL.",
        agrees=False,
    ),
)
"""The same losses where the two differ as they come."""

NOT_OURS = {
    ("CPO", "hinge"): "the hinge without a reference",
    ("CPO", "ipo"): "IPO without a reference",
    ("TPO", "hinge"): "the same two, for triples",
    ("TPO", "ipo"): "the same two, for triples",
}
"""(trainer, loss type) that TRL has and we do not."""

DEFAULTS: tuple[tuple[str, str, str, str], ...] = (
    ("sigmoid", "beta", "DPO", "beta"),
    ("rdpo", "label_smoothing", "DPO", "label_smoothing"),
    ("exo_pair", "label_smoothing", "DPO", "label_smoothing"),
    ("sppo", "beta", "DPO", "beta"),
    ("discopop", "beta", "DPO", "beta"),
    ("discopop", "tau", "DPO", "discopop_tau"),
    ("ln_dpo", "beta", "DPO", "beta"),
    ("ld_dpo", "alpha", "DPO", "ld_alpha"),
    ("kto", "beta", "KTO", "beta"),
    ("kto", "desirable_weight", "KTO", "desirable_weight"),
    ("kto", "undesirable_weight", "KTO", "undesirable_weight"),
    ("cpo", "beta", "CPO", "beta"),
    ("cpo", "nll_weight", "CPO", "cpo_alpha"),
    ("simpo", "beta", "CPO", "beta"),
    ("simpo", "gamma", "CPO", "simpo_gamma"),
    ("alphapo", "beta", "CPO", "beta"),
    ("alphapo", "gamma", "CPO", "simpo_gamma"),
    ("alphapo", "alpha", "CPO", "alpha"),
    ("orpo", "odds_weight", "ORPO", "beta"),
)
"""(our loss, its option, TRL's trainer, its option): whose defaults the page lists."""
