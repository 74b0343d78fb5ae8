"""The HTML report of a run: one file that needs nothing else, for a phone and for a wide screen.

Everything a model or a user wrote is text in it, never markup: the template escapes, and the page's
content security policy runs no script but the report's own two.
"""

from __future__ import annotations

import base64
import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from online_po import files, guard_view, judge_view
from online_po.report_charts import BY_ROUND, TRAINING, charts, source_chart
from online_po.run_view import (
    USEFUL_PHASES,
    RunView,
    duration,
    example_count,
    interval,
    load_run_view,
    number,
    plural,
    sample_comparisons,
    sample_labels,
    sample_pairs,
    side_of_half,
    time_use,
    verdict,
)

COMPARISONS = 6
"""Held-out prompts shown with the response before and after."""
PAIRS = 4
"""Pairs shown of the first and of the latest round."""

TRAINING_NOTES = {
    "rewards": "β·(log π − log π_ref).",
    "margin": "Implicit reward of the better minus that of the worse.",
    "logps": "Summed over response tokens, in nats.",
    "kl": "Mean log-ratio on the round's responses, in nats.",
    "entropy": "Of the next token, mean over response tokens, in nats.",
    "grad_norm": "Before clipping.",
    "beta": "By round; of the first loss that has one.",
    "sampling_kl": "By round, of the policy that sampled it, on its own responses (k1).",
    "reference": "By round: the policy that it is, or of a mean the round that made it.",
    "mismatch": "By round, nats a token between sampler and learner; dashed: reference.max_mismatch.",
    "sources": "By round.",
}

ACCURACY_NOTES = {
    "pair": "Share of pairs whose chosen response has the higher implicit reward.",
    "label": "Share of responses whose implicit reward has the sign of their label.",
}

SOURCES = {
    "fresh": "of the round's responses",
    "spin": "a given response against an own one",
    "replay": "replayed from earlier rounds",
    "seed": "from pairs.seed_path",
}

REASONS = {
    "judge_failed": "the judge failed",
    "identical": "all responses the same",
    "tie": "all scores equal",
    "below_min_margin": "gap below pairs.min_margin",
    "length_ratio": "lengths further apart than pairs.max_length_ratio",
    "same_as_chosen": "all responses as the given one",
    "chosen_too_long": "the given response is over the context",
    "no_contrast": "no response labelled",
    "balance": "of a domain too large for pairs.balance_ratio",
    **SOURCES,
    "loaded": "loaded",
    "used": "used",
    "empty": "empty",
    "duplicates": "exact duplicates",
    "too_long": "over prompts.max_tokens",
    "in_train": "also in the training file",
    "held_out": "held out for evaluation",
    "timeout": "timed out",
    "transport": "could not be reached, or would not serve",
    "refusal": "declined to judge",
    "unparsable": "gave no verdict that can be read",
    "abstained": "judges disagreed too much",
    "error": "raised an error",
    "bad_value": "gave no finite number, or one out of range",
    "bad_length": "gave the wrong number of scores",
}


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the report of a run, finished or not, to `out` (default: report.html in the run folder).

    Returns the path. The same folder gives the same report.
    """
    path = out or run_dir / "report.html"
    files.write_text(path, render(load_run_view(run_dir)))
    return path


def render(view: RunView) -> str:
    """The report as HTML text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    here = Path(__file__).parent
    plotly, js = get_plotlyjs(), (here / "report.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(here),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(number=number, interval=interval, plural=plural, side_of_half=side_of_half)
    last = view.evaluations[-1] if view.evaluations else None
    return environment.get_template("report.html.jinja").render(
        view=view,
        verdict=verdict(view),
        tiles=_tiles(view),
        best=guard_view.best(view),
        guards=[*guard_view.roll_backs(view), *guard_view.findings(view)],
        table=_table(view),
        charts=charts(view) | source_chart(view, SOURCES),
        comparisons=_comparisons(view),
        overall=last and last["versus_start"],
        latest=last and last["policy_version"],
        pairs=_examples(view, "pairs"),
        labels=_examples(view, "labels"),
        reasons=REASONS,
        training=[(name, title) for name, title, _, _ in TRAINING]
        + [(name, title) for name, title, _ in BY_ROUND]
        + [("sources", f"Where {view.example}s came from")],
        training_notes=TRAINING_NOTES | {"accuracy": ACCURACY_NOTES[view.example]},
        time_note=_time_note(view),
        left_out=_left_out(view),
        judge=judge_view.table(view),
        judge_notes=judge_view.notes(view),
        facts=_facts(view),
        css=(here / "report.css").read_text(encoding="utf-8"),
        plotly=plotly,
        js=js,
        script_hashes=[_script_hash(plotly), _script_hash(js)],
    )


def _script_hash(text: str) -> str:
    """A script as the content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _tiles(view: RunView) -> list[dict[str, str]]:
    """The few numbers worth seeing first."""
    tiles = []
    if view.evaluations and (last := view.evaluations[-1])["score"] is not None:
        first = view.evaluations[0]
        both = first is not last and first["score"] is not None
        tiles.append(
            {
                "label": "held-out score",
                "value": (f"{number(first['score']['mean'])} → " if both else "") + number(last["score"]["mean"]),
                "note": _bounds(last["score"]),
            }
        )
        if (comparison := last["versus_start"]) and (rate := comparison["win_rate"]):
            note = f"{comparison['wins']} won, {comparison['ties']} tied, {comparison['losses']} lost"
            tiles.append({"label": "win rate against the start", "value": f"{100 * rate['mean']:.0f}%", "note": note})
        tiles.append(
            {
                "label": "mean response length",
                "value": (f"{first['length_mean']:.0f} → " if both else "") + f"{last['length_mean']:.0f} tokens",
                "note": f"{100 * last['truncated_share']:.0f}% cut at the limit",
            }
        )
    responses = sum(r.summary["responses"] for r in view.trained_rounds)
    examples = sum(example_count(r.summary) or 0 for r in view.trained_rounds)
    tiles.append(
        {
            "label": "rounds committed",
            "value": f"{view.trained} of {view.planned}",
            "note": f"{plural(responses, 'response')}, {plural(examples, view.example)}",
        }
    )
    if (use := time_use(view)) and use["wall"]:
        tiles.append(
            {
                "label": "time after start-up",
                "value": duration(use["wall"]),
                "note": f"{100 * use['useful'] / use['wall']:.0f}% of it at work",
            }
        )
    return tiles


def _bounds(value: dict[str, Any]) -> str:
    return "" if value["low"] is None else f"95% interval {number(value['low'])} to {number(value['high'])}"


def _table(view: RunView) -> list[dict[str, Any]]:
    """One row a committed policy, as text where there is no interval to colour."""
    rows = []
    for round_ in view.table_rounds:
        evaluation = round_.evaluation or dict.fromkeys(("score", "versus_start", "versus_previous"))
        length, share = evaluation.get("length_mean"), evaluation.get("truncated_share")
        count, kl = example_count(round_.summary), view.kl_to_start(round_.number)
        rows.append(
            {
                "name": f"round {round_.number}" if round_.number else "start",
                "evaluation": evaluation,
                "tokens": "–" if length is None else f"{length:.1f}",
                "cut": "–" if share is None else f"{100 * share:.1f}%",
                "examples": "–" if count is None else f"{count:,}",
                "kl": "–" if kl is None else f"{kl:.3f}",
            }
        )
    return rows


def _seed(view: RunView, purpose: str) -> int:
    return random.Random(f"{view.config['run']['seed']}:{purpose}").getrandbits(32)


def _comparisons(view: RunView) -> list[dict[str, Any]]:
    evaluated = [r.folder for r in view.rounds if r.evaluation is not None]
    if len(evaluated) < 2 or view.evaluations[0]["policy_version"] != 0:
        return []
    return sample_comparisons(evaluated[0], evaluated[-1], COMPARISONS, _seed(view, "comparisons"))


def _examples(view: RunView, kind: Literal["pairs", "labels"]) -> list[tuple[int, list[dict[str, Any]]]]:
    """(round, pairs or labelled responses) of the latest round, then of the first."""
    rounds = [r for r in view.rounds if (r.folder / f"{kind}.parquet").exists()]
    shown = dict.fromkeys([rounds[-1].number, rounds[0].number]) if rounds else {}
    folders, sample = {r.number: r.folder for r in rounds}, sample_pairs if kind == "pairs" else sample_labels
    return [(n, sample(folders[n], PAIRS, _seed(view, f"{kind} {n}"))) for n in shown]


def _time_note(view: RunView) -> str:
    note = "Busy seconds of each phase"
    if view.config["loop"]["max_staleness"]:
        note += "; rounds overlap (loop.max_staleness), so bars together are longer than the run"
    note += ". A round's evaluation is of the policy it starts from."
    if (use := time_use(view)) and use["wall"]:
        share = 100 * use["useful"] / use["wall"]
        note = (
            f"{share:.0f}% of the {duration(use['wall'])} after start-up went into {', '.join(USEFUL_PHASES[:-1])} and "
            f"{USEFUL_PHASES[-1]}; start-up took {duration(use['startup'])}. {note}"
        )
    if view.restarts:
        times = Counter(restart["restart"] for restart in view.restarts)
        again = ", ".join(f"{who} ({plural(count, 'time')})" for who, count in times.items())
        lost = sum(restart["seconds"] for restart in view.restarts)
        note += f" Died and started again: {again}; that took {duration(lost)}."
    return note


def _left_out(view: RunView) -> list[dict[str, Any]]:
    """Counts by reason, over the whole run."""
    skips: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    drops: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for round_ in view.trained_rounds:
        skips.update(round_.summary["pair_skips"])
        # Runs of an earlier version have neither.
        sources.update(round_.summary.get("sources", {}))
        drops.update(round_.summary.get("pair_drops", {}))
        failures.update(round_.summary["judge_failures"])
    heldout: Counter[str] = Counter()
    for evaluation in view.evaluations:
        heldout.update(evaluation["failures"])
    prompts = view.info.get("prompts", {})
    groups = [
        (f"Prompts without a {view.example}", skips),
        (f"{view.example.capitalize()}s left out", drops),
        (f"Where {view.example}s came from", sources if len(sources) > 1 else {}),
        ("Failed judgements, training prompts", failures),
        ("Failed judgements, held-out prompts", heldout),
        *((f"Prompts, {name}", prompts[key]) for key, name in PROMPT_SETS if prompts.get(key)),
    ]
    return [{"title": title, "rows": _reason_rows(counts)} for title, counts in groups]


PROMPT_SETS = (("train", "training"), ("heldout", "held out"))


def _reason_rows(counts: dict[str, int]) -> list[tuple[str, str]]:
    return [(REASONS.get(reason, reason), f"{count:,}") for reason, count in counts.items() if count]


def _loss(loss: dict[str, Any]) -> str:
    weight = "" if loss["weight"] == 1 else f"{loss['weight']:g} x "
    return f"{weight}{loss['name']}" + (f", β {_beta(loss['beta'])}" if "beta" in loss else "")


def _beta(beta: float | list[float]) -> str:
    """One for the run, or one for each round."""
    return ", ".join(f"{value:g}" for value in (beta if isinstance(beta, list) else [beta]))


def _reference(reference: dict[str, Any]) -> str:
    settings = [
        f"{name} {reference[name]:g}" for name in ("every", "alpha", "above") if reference.get(name) is not None
    ]
    shown = {"refresh": settings[:1], "ema": settings, "kl": settings[1:]}.get(reference["kind"], [])
    return ", ".join([reference["kind"], *shown])


def _facts(view: RunView) -> list[tuple[str, str]]:
    config, info = view.config, view.info
    versions = info.get("versions", {})
    return [
        ("starting model", config["model"]["path"]),
        ("loss", " + ".join(map(_loss, config["loss"]))),
        ("reference", _reference(config["reference"])),
        ("trained", "LoRA adapters" if config["learner"]["lora"] else "all weights"),
        ("judge", config["judge"]["kind"]),
        ("seed", str(config["run"]["seed"])),
        ("started", info.get("created", "–")),
        ("machine", info.get("platform", "–")),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items()) or "–"),
    ]
