"""What happens when a guard fires: the run ends, or goes back to the last good round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from online_po.errors import GuardError, NonFiniteError
from online_po.evaluation import best_version
from online_po.fail_points import fail_point
from online_po.guards import Finding
from online_po.integrity import needed_weights
from online_po.ledger import Ledger
from online_po.parts import Parts
from online_po.retention import heldout_scores


class RollBack(Exception):
    """A guard wants the run to go back. `since`: the newest round there is, or the one that could not be trained."""

    def __init__(self, finding: Finding, since: int) -> None:
        super().__init__(finding["message"])
        self.finding, self.since = finding, since


def unsettled(ledger: Ledger, record: Mapping[str, Any] | None) -> Finding | None:
    """The finding in a round's row, or in a policy's evaluation, that is still to be acted on; going back comes before
    stopping. Stops that a resumed run goes past are settled."""
    if not record or not record.get("guards"):
        return None
    settled = {(stop["policy"], stop["attempt"], stop["guard"]) for stop in ledger.guard_stops()}
    open_: list[Finding] = [f for f in record["guards"] if (f["policy"], record["attempt"], f["name"]) not in settled]
    wanted = [f for action in ("roll_back", "stop") for f in open_ if f["action"] == action]
    return wanted[0] if wanted else None


def act(ledger: Ledger, record: Mapping[str, Any] | None, since: int) -> None:
    """Acts on what guards found in a round's row or a policy's evaluation, unless that was done already.

    Raises RollBack, or GuardError where the run is to end; `since`: the newest committed round.
    """
    finding = unsettled(ledger, record)
    if finding is None or record is None:
        return
    why = f"guards.{finding['name']}.action is {finding['action']}"
    if finding["action"] == "roll_back":
        if last_good_round(ledger, finding) is not None:
            raise RollBack(finding, since)
        why += ", but there is no good round before it" + (" whose weights are kept" if finding["policy"] else "")
    # Noted first: a resumed run goes on past it.
    stop = {"policy": finding["policy"], "attempt": record["attempt"], "guard": finding["name"]}
    ledger.write_guard_stop(stop | {"round": since, "message": finding["message"]})
    raise GuardError(
        f"{why}: {finding['message']} All rounds up to {since} are kept; `online-po resume {ledger.root}` goes on "
        "past this"
    )


def last_good_round(ledger: Ledger, finding: Finding) -> int | None:
    """The newest round before the policy that shows the fault, of those whose policy no guard wants back; where the
    held-out score fell, the round with the best one. None where there is none, or not all that it takes to go on from
    it is kept: an older one would throw away good rounds."""
    policy = finding["policy"]
    if finding["name"] == "over_optimisation":
        good = best_version(heldout_scores(ledger, policy - 1))
    else:
        bad = {
            f["policy"]
            for round_ in range(1, (ledger.last_committed() or 0) + 1)
            for f in ledger.round_row(round_).get("guards", ())
            if f["action"] == "roll_back"
        }
        good = next((round_ for round_ in range(policy - 1, -1, -1) if round_ not in bad), None)
    return good if good is not None and _can_go_on(ledger, good) else None


def _can_go_on(ledger: Ledger, round_: int) -> bool:
    """Whether all weights that it takes to go on from the round are kept."""
    return all((ledger.round_dir(version) / name).exists() for version, name in needed_weights(ledger, round_))


def go_back(parts: Parts, wanted: RollBack) -> int:
    """Takes the run back to the last good round, and returns that; the learner is to load it.

    Raises GuardError past `guards.max_roll_backs`, with the run at the good round; NonFiniteError where a round that
    cannot be trained has no good one before it.
    """
    ledger, finding, bound = parts.ledger, wanted.finding, parts.config.guards.max_roll_backs
    good = last_good_round(ledger, finding)
    if good is None:
        raise NonFiniteError(finding["message"]) from wanted
    fail_point("roll_back.begin")
    ledger.roll_back(since=wanted.since, to=good, guard=finding["name"], message=finding["message"])
    fail_point("roll_back.end")
    said = f"guard {finding['name']}: {finding['message']} The run went back from round {wanted.since} to round {good}"
    if ledger.guard_roll_backs() > bound:
        raise GuardError(
            f"{said}, and stopped: guards.max_roll_backs is {bound}. What was made since is in its folder rolled_back; "
            f"`online-po resume {ledger.root}` tries again with new sampling seeds"
        )
    parts.observer.message(f"{said}, and goes on with new sampling seeds")
    return good


def load_round(parts: Parts, round_: int) -> None:
    """Gives the learner a committed round's weights and optimizer state, their hashes checked."""
    ledger = parts.ledger
    if round_ > 0:
        ledger.verify(round_, "trainer")
    parts.learner.load(ledger.policy(round_, parts.start), ledger.round_dir(round_) / "trainer")
