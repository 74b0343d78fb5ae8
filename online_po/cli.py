"""The command line. Imports little until a command is known, so that --help is instant."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from online_po.launch import RunResult
    from online_po.plan import Plan
    from online_po.protocols import Observer
    from online_po.stopping import Stop

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Iterative and online preference optimization: generate, judge, pair, train, again.",
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the run.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's.", show_default=False),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.", show_default=False)]


@app.command()
def check(config: ConfigFile, overrides: Overrides = None) -> None:
    """Validate a config, load its tokenizer and prompts, print the plan. Starts nothing."""
    from online_po.config import Config
    from online_po.console import ConsoleObserver, print_plan
    from online_po.launch import checked_plan

    screen = ConsoleObserver()
    try:
        plan = checked_plan(Config.from_yaml(config, overrides or []), screen)
    finally:
        screen.close()
    print_plan(plan)


@app.command()
def run(config: ConfigFile, overrides: Overrides = None) -> None:
    """Run a config: a new run, or the rest of one that was stopped."""
    from online_po.config import Config
    from online_po.launch import run as launch_run

    _run(
        lambda observers, on_plan, stop: launch_run(
            Config.from_yaml(config, overrides or []), observers, on_plan, stop=stop
        )
    )


@app.command()
def resume(
    run: RunFolder,
    from_round: Annotated[
        int | None,
        typer.Option(help="Go back to this committed round first; what came after is moved into rolled_back."),
    ] = None,
) -> None:
    """Go on with the run in a folder, by the config it was made with."""
    from online_po.launch import resume as launch_resume

    _run(lambda observers, on_plan, stop: launch_resume(run, observers, on_plan, stop=stop, from_round=from_round))


@app.command()
def verify(run: RunFolder) -> None:
    """Check every file of a run by its hash; name what is damaged, and the last round that is whole."""
    from online_po.console import ConsoleObserver
    from online_po.errors import LedgerError
    from online_po.integrity import find_damage, say_damage
    from online_po.ledger import Ledger

    ledger, screen = Ledger(run), ConsoleObserver()
    if not ledger.exists():
        Ledger.open(run)  # says that it is none
    if (holder := ledger.holder()) is not None:  # files come and go while it runs
        raise LedgerError(f"run folder {str(run)!r} is in use by {holder}; verify it when that has ended")
    try:
        with screen.phase("verify", 0):
            found = find_damage(ledger, True, lambda done, total: screen.progress("verify", done, total))
    finally:
        screen.close()
    if found:
        raise LedgerError(say_damage(ledger, found))
    last = ledger.last_committed()
    upto = "" if last is None else f", up to round {last}, the last committed"
    typer.echo(f"every file is as it was written{upto}")


@app.command()
def status(run: RunFolder) -> None:
    """Where a run stands: rounds, held-out scores, what is being done now."""
    from online_po.console import print_status
    from online_po.ledger import Ledger

    print_status(Ledger.open(run))


@app.command()
def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Where to write it; default: report.html in the run folder.")] = None,
) -> None:
    """Write the HTML report of a run, finished or not."""
    from online_po.ledger import Ledger
    from online_po.report import write_report

    typer.echo(write_report(Ledger.open(run).root, out))


@app.command()
def export(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write the model to.", show_default=False)],
    round_: Annotated[
        int | None,
        typer.Option("--round", help="Round to export; default: the last one, or with eval.early_stop the best."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Merge a LoRA adapter into the starting model.")] = False,
) -> None:
    """Copy a policy out of a run: a folder that transformers and vLLM load."""
    from online_po.export import default_round
    from online_po.export import export as export_policy

    round_ = default_round(run) if round_ is None else round_
    path = export_policy(run, out, round_, merge)
    typer.echo(f"the policy of round {round_}:", err=True)
    typer.echo(path)


@app.command()
def judge(
    config: ConfigFile,
    source: Annotated[Path, typer.Argument(metavar="IN", help="Rows with prompt and responses.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .jsonl file to write.", show_default=False)],
    overrides: Overrides = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Where answers are kept, a run's judge_cache.sqlite perhaps; default: beside OUT."),
    ] = None,
) -> None:
    """Score or compare the responses of a file with a config's judge, without a run."""
    from judges.standalone import judge_file
    from online_po.config import read_judge
    from online_po.console import ConsoleObserver

    section, screen = read_judge(config, overrides or []), ConsoleObserver()
    cache = cache or out.with_suffix(".judge_cache.sqlite")
    try:
        with screen.phase("judge", 0):
            judged = judge_file(section, source, out, cache, lambda done, total: screen.progress("judge", done, total))
    except KeyboardInterrupt:
        typer.echo(f"stopped; what was judged is kept in {cache}: run this again to go on", err=True)
        raise typer.Exit(130) from None
    finally:
        screen.close()
    failed = "".join(f", {count} x {kind}" for kind, count in judged.failures.items())
    agrees = "" if judged.accuracy is None else f"; agrees with {judged.accuracy:.1%} of the file's pairs"
    typer.echo(f"{judged.rows} rows{failed}{agrees}: {out}")
    judged.require_few_failures(section.max_failure_rate)


@app.command()
def pairs(
    run: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The .parquet file to write.", show_default=False)],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Another setting, such as pairs.strategy=all."),
    ] = None,
    round_: Annotated[int | None, typer.Option("--round", help="One round only; default: all that are judged.")] = None,
) -> None:
    """Build a run's pairs again from its judgements, with other settings."""
    from online_po.ledger import Ledger
    from online_po.rebuild import rebuild

    made = rebuild(Ledger.open(run), out, changes or [], round_)
    typer.echo(f"{sum(made.values())} rows of {len(made)} rounds: {out}")


def _run(start: Callable[[list[Observer], Callable[[Plan], None], Stop], RunResult]) -> None:
    """Runs with a screen, and ends with the table; a signal ends the run in order."""
    from online_po.console import ConsoleObserver, print_result
    from online_po.errors import Interrupted, OnlinePOError
    from online_po.run_view import load_run_view
    from online_po.stopping import EXIT_CODE, StopSignals

    console = ConsoleObserver()
    folder: list[Path] = []

    def on_plan(plan: Plan) -> None:
        folder.append(plan.config.run_dir)
        console.plan(plan)

    with StopSignals() as stop:
        try:
            result = start([console], on_plan, stop)
        except (KeyboardInterrupt, OnlinePOError, OSError) as error:
            if not stop.asked:
                raise
            # Of others that died of the same signal, say.
            why = "" if isinstance(error, (KeyboardInterrupt, Interrupted)) else f" ({error})"
            where = f"; go on with: online-po resume {folder[0]}" if folder else ""
            with suppress(OSError):  # nobody reads it any more
                typer.echo(f"stopped{why}, what was finished is kept{where}", err=True)
            raise typer.Exit(EXIT_CODE) from None
    print_result(load_run_view(result.run_dir))
    typer.echo(f"report: {result.report}")


def main() -> None:
    """Entry point. Exit codes: 0 done, 2 bad input, 3 stopped by a fault (a full disk or a damaged file too), 4 paused
    (judge.budget is spent), 130 stopped by a signal (SIGINT, SIGTERM, SIGUSR1)."""
    from online_po.errors import OnlinePOError

    try:
        app()
    except (OnlinePOError, OSError) as error:
        from rich.console import Console
        from rich.text import Text

        Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), str(error)))
        raise SystemExit(getattr(error, "exit_code", 3)) from None


if __name__ == "__main__":
    main()
