"""Numbers about what was sampled and how it trained. Without torch."""

from __future__ import annotations

import hashlib
import heapq
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from online_po.types import Group, Judgement, Response

DIVERSITY_GROUPS = 32
"""Groups on which diversity is measured; its cost per round does not grow with the round."""
DIVERSITY_RESPONSES = 8
"""Responses of such a group that are compared, in order of their index."""
HISTOGRAM_VALUES = 16
"""Up to this many distinct values a histogram keeps them as they are: a judge's few grades stay grades."""
HISTOGRAM_BINS = 32
"""A histogram has at most two bins more than this."""

SUMMED = ("pairs", "labels", "desirable", "undesirable", "tokens", "seconds", "skipped")
"""Step metrics that add up over a round; `tokens` are response tokens, `skipped` is 1 for a step that was not finite
and left out."""
PER_TOKEN = ("entropy",)
"""Step metrics that are means over response tokens: weighted by those, not by pairs."""
PER_STEP = ("grad_norm", "learning_rate", "micro_batch_tokens", "recomputes")
"""Step metrics of the optimizer step itself: every step counts once."""


class SampleStats:
    """Statistics of a round's responses and scores, group by group as they come.

    Holds two numbers a response, and the tokens of at most `DIVERSITY_GROUPS` groups. Which groups those
    are depends on `seed` and the prompt ids alone, not on the order of arrival.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._sizes = array("q")  # responses in each group
        self._lengths = array("q")  # response tokens, of every response
        self._truncated = 0
        self._scores = array("d")  # of judged responses
        self._judged = array("b")  # 1 where a group was judged, else 0
        self._compared = self._consistent = 0  # pairs of responses that were compared in both orders
        # A max-heap (by negated hash) of the groups with the smallest hashes: a uniform sample of prompts.
        self._sample: list[tuple[int, int, list[tuple[int, ...]]]] = []

    def add(self, group: Group, judgement: Judgement) -> None:
        """Counts one group; where its judgement failed, lengths count and scores do not."""
        responses = group.responses
        self._sizes.append(len(responses))
        self._lengths.extend([len(response.token_ids) for response in responses])
        self._truncated += sum([response.finish_reason == "length" for response in responses])
        self._judged.append(judgement.scores is not None)
        if judgement.scores is not None:
            self._scores.extend(judgement.scores)
        for comparison in judgement.comparisons or ():
            self._compared += comparison.consistent is not None
            self._consistent += bool(comparison.consistent)
        self._keep_sample(group.prompt.id, responses)

    def _keep_sample(self, prompt_id: str, responses: Sequence[Response]) -> None:
        digest = hashlib.blake2b(f"{self.seed}:{prompt_id}".encode(), digest_size=8).digest()
        rank = -int.from_bytes(digest, "big")
        full = len(self._sample) >= DIVERSITY_GROUPS
        if full and rank <= self._sample[0][0]:
            return
        item = (rank, len(self._sizes), [response.token_ids for response in responses[:DIVERSITY_RESPONSES]])
        (heapq.heappushpop if full else heapq.heappush)(self._sample, item)

    def result(self) -> dict[str, Any]:
        """The round's sampling metrics, ready for JSON; what cannot be computed is None.

        groups, failed_groups (judge gave no scores), responses, response_tokens (sum);
        score_mean/std over judged responses, score_best/worst: mean over groups of the group's best/worst;
        tie_groups: judged groups whose scores are all equal;
        length_mean/p10/p90 in tokens; truncated_share: share of responses cut at the length limit;
        length_score_correlation: Pearson correlation of length and score after each group's own mean is
        taken off both, so that long-answer prompts do not count as length preference;
        order_consistency: share of the pairs compared in both orders on which both said the same; not without such;
        distinct_1/2 and self_bleu on the diversity sample, see `distinct_n` and `self_bleu`;
        score_histogram, length_histogram: see `histogram`.
        """
        sizes, judged = np.asarray(self._sizes), np.asarray(self._judged, dtype=bool)
        lengths = np.asarray(self._lengths, dtype=np.float64)
        samples = [tokens for _, _, tokens in sorted(self._sample)]
        return {
            "groups": len(sizes),
            "failed_groups": int((~judged).sum()),
            "responses": len(lengths),
            "response_tokens": int(lengths.sum()),
            **self._score_metrics(sizes, judged, lengths),
            **({"order_consistency": self._consistent / self._compared} if self._compared else {}),
            "length_mean": _mean(lengths),
            "length_p10": float(np.percentile(lengths, 10)) if len(lengths) else None,
            "length_p90": float(np.percentile(lengths, 90)) if len(lengths) else None,
            "truncated_share": self._truncated / len(lengths) if len(lengths) else None,
            "distinct_1": _mean_known(distinct_n(tokens, 1) for tokens in samples),
            "distinct_2": _mean_known(distinct_n(tokens, 2) for tokens in samples),
            "self_bleu": _mean_known(self_bleu(tokens) for tokens in samples),
            "length_histogram": histogram(lengths),
        }

    def _score_metrics(self, sizes: np.ndarray, judged: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
        scores = np.asarray(self._scores)  # (R,) of judged responses, group after group
        sizes_judged = sizes[judged]
        if not len(scores):
            names = ("score_mean", "score_std", "score_best", "score_worst", "length_score_correlation")
            return {**dict.fromkeys(names), "tie_groups": 0, "score_histogram": histogram(scores)}
        starts = np.concatenate([[0], np.cumsum(sizes_judged)[:-1]])
        best, worst = np.maximum.reduceat(scores, starts), np.minimum.reduceat(scores, starts)
        lengths_judged = lengths[np.repeat(judged, sizes)]
        return {
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std()),
            "score_best": float(best.mean()),
            "score_worst": float(worst.mean()),
            "tie_groups": int((best == worst).sum()),
            "length_score_correlation": _correlation(
                _centred(lengths_judged, starts, sizes_judged), _centred(scores, starts, sizes_judged)
            ),
            "score_histogram": histogram(scores),
        }


def _centred(values: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(R,) values minus the mean of their group."""
    centred = values - np.repeat(np.add.reduceat(values, starts) / sizes, sizes)
    # A group of equal values leaves rounding dust, which is no variation.
    return np.where(np.abs(centred) <= 1e-12 * np.abs(values), 0.0, centred)


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Pearson correlation of two centred arrays; None where one of them does not vary."""
    xx, yy = float(x @ x), float(y @ y)
    if xx == 0 or yy == 0:
        return None
    return float(np.clip(x @ y / math.sqrt(xx * yy), -1.0, 1.0))


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _mean_known(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def histogram(values: np.ndarray) -> dict[str, Any]:
    """How often each value occurs, exactly where there are few distinct ones, else in bins.

    At most `HISTOGRAM_VALUES` distinct values: {"values": [...], "counts": [...]}. More: {"width": w,
    "first": k, "counts": [...]}, where count i is of k + i <= value / w < k + i + 1 and w is a power of two, so
    that the bins of two histograms nest and `to_bins` brings the finer one onto the coarser one's exactly.
    """
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= HISTOGRAM_VALUES:
        return {"values": distinct.tolist(), "counts": counts.tolist()}
    width = bin_width(float(distinct[0]), float(distinct[-1]))
    return _binned(np.floor(distinct / width).astype(np.int64), counts, width)


def bin_width(low: float, high: float) -> float:
    """The smallest power of two that covers low to high (low < high) in `HISTOGRAM_BINS` bins."""
    return 2.0 ** math.ceil(math.log2((high - low) / HISTOGRAM_BINS))


def to_bins(histogram_: Mapping[str, Any], width: float) -> dict[str, Any]:
    """The same histogram in bins of `width`: a power of two, at least as large as the width it has."""
    if "values" in histogram_:
        bins = np.floor(np.asarray(histogram_["values"]) / width).astype(np.int64)
    else:
        at = histogram_["first"] + np.arange(len(histogram_["counts"]))
        bins = at // round(width / histogram_["width"])
    return _binned(bins, np.asarray(histogram_["counts"]), width)


def _binned(bins: np.ndarray, counts: np.ndarray, width: float) -> dict[str, Any]:
    """(B,) bin numbers, any of them more than once, and their counts, as a histogram of whole bins."""
    first = int(bins.min())
    summed = np.bincount(bins - first, weights=counts).astype(np.int64)
    return {"width": width, "first": first, "counts": summed.tolist()}


def distinct_n(responses: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of one prompt's responses (Li et al. 2016), on token ids.

    1 means that nothing repeats, within a response or between them. None without any n-gram.
    """
    grams = [gram for tokens in responses for gram in _ngrams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else None


def self_bleu(responses: Sequence[Sequence[int]]) -> float | None:
    """Mean BLEU-4 of each response against the others to the same prompt (Zhu et al. 2018, Texygen).

    On token ids, so that no language's words have to be split; 1 means identical responses, 0 nothing in
    common. None for fewer than two non-empty responses.
    """
    responses = [tokens for tokens in responses if tokens]
    if len(responses) < 2:
        return None
    counts = [[Counter(_ngrams(tokens, n)) for tokens in responses] for n in (1, 2, 3, 4)]
    # For each n-gram the two responses that use it most: the best of all others in one look-up.
    tops = [_two_largest(order) for order in counts]
    lengths = [len(tokens) for tokens in responses]
    scores = []
    for i, length in enumerate(lengths):
        others = lengths[:i] + lengths[i + 1 :]
        clipped = [
            sum(min(own, top[gram][1] if top[gram][2] == i else top[gram][0]) for gram, own in order[i].items())
            for order, top in zip(counts, tops, strict=True)
        ]
        scores.append(_bleu(clipped, length, others))
    return math.fsum(scores) / len(scores)


def _ngrams(tokens: Sequence[int], n: int) -> Iterable[tuple[int, ...]]:
    return zip(*(tokens[i:] for i in range(n)), strict=False)


def _two_largest(counts: Sequence[Counter[tuple[int, ...]]]) -> dict[tuple[int, ...], tuple[int, int, int]]:
    """n-gram -> (largest count, second largest, response with the largest)."""
    tops: dict[tuple[int, ...], tuple[int, int, int]] = {}
    for i, counter in enumerate(counts):
        for gram, count in counter.items():
            first, second, owner = tops.get(gram, (0, 0, -1))
            if count > first:
                tops[gram] = (count, first, i)
            elif count > second:
                tops[gram] = (first, count, owner)
    return tops


def _bleu(clipped: Sequence[int], length: int, reference_lengths: Sequence[int]) -> float:
    """BLEU-4 (Papineni et al. 2002) from clipped n-gram matches, n = 1 to 4.

    An order without a match counts 0.1 matches (Chen & Cherry 2014, smoothing 1, as NLTK does it); no
    common token at all is 0. Brevity penalty against the nearest reference length, the shorter on a tie.
    """
    if clipped[0] == 0:
        return 0.0
    precisions = [(match or 0.1) / max(1, length - n) for n, match in enumerate(clipped)]
    nearest = min(reference_lengths, key=lambda other: (abs(other - length), other))
    brevity = 1.0 if length > nearest else math.exp(1 - nearest / length)
    return brevity * math.exp(math.fsum(math.log(p) for p in precisions) / 4)


def round_means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One round's value of every step metric: what one step over all its pairs would have shown.

    Counts (`SUMMED`) are summed; means over tokens (`PER_TOKEN`) are weighted by the step's tokens, optimizer
    values (`PER_STEP`) equally, all else by its pairs or labels, chosen_* and rejected_* of labels by the desirable and
    undesirable ones. A metric that only some steps carry is averaged over those.
    """
    means: dict[str, float] = {}
    for name in dict.fromkeys(key for step in steps for key in step):
        if name in ("kind", "round", "step"):
            continue
        carrying = [step for step in steps if name in step]
        values = [step[name] for step in carrying]
        if name in SUMMED:
            means[name] = math.fsum(values)
            continue
        weights = [_weight(name, step) for step in carrying]
        means[name] = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)
    if "labels" in means and {"chosen_reward", "rejected_reward"} <= means.keys():
        means["margin"] = means["chosen_reward"] - means["rejected_reward"]
    return means


def _weight(name: str, step: Mapping[str, float]) -> float:
    if name in PER_STEP:
        return 1.0
    if name in PER_TOKEN:
        return step["tokens"]
    if "pairs" in step:
        return step["pairs"]
    return step[{"chosen": "desirable", "rejected": "undesirable"}.get(name.split("_")[0], "labels")]


def likelihood_shift(means: Mapping[str, float], sampler: Mapping[str, np.ndarray]) -> dict[str, float]:
    """chosen_shift, rejected_shift: log(policy while it trained / policy that sampled) of a round's responses, mean
    over pairs, in nats a response, at temperature 1.

    The same pairs on both sides, so that neither prompts nor the reference enter, and rounds compare. Below zero on
    both sides is likelihood displacement: the mass goes to responses that nobody judged. `means`: `round_means`;
    `sampler`: {side: (N,)} the sampling policy's logps. Nothing where steps were left out, or where not all responses
    are the round's own (their logps are NaN).
    """
    sides = ("chosen", "rejected")
    if means.get("skipped") or any(f"{side}_logps" not in means for side in sides):
        return {}
    if any(side not in sampler or np.isnan(sampler[side]).any() for side in sides):
        return {}
    return {f"{side}_shift": means[f"{side}_logps"] - float(sampler[side].mean()) for side in sides}
