#!/usr/bin/env python3
"""Kill runs of a tiny model, resume them until they are done, and compare every file with a run that was never stopped.

Kills are SIGKILL, at fail points (`online_po.fail_points`) and at random times, some while a run resumes; the seed
decides which. With `fakes` and `local` (the transformers engine and the real learner) a run is a fork of this process:
hundreds of kills take some minutes. With `transformers` and `vllm` it is the command line with real Ray.

    python scripts/chaos.py --engine local --trials 100
    python scripts/chaos.py --engine fakes --every-point        # each fail point once
    python scripts/chaos.py --engine vllm --trials 5
    python scripts/chaos.py --shape ahead --point commit.hashed:2 --point sync.begin    # one run, killed twice

Exits with 1 if a file differs, if a piece that was durable was made again, or if a run does not end.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tokenizers then stay as they are in a fork

import psutil
from rich.console import Console
from rich.table import Table

from chaos_kills import (
    Kill,
    Trial,
    Whole,
    count_pieces,
    count_steps,
    every_point,
    flip_a_byte,
    may_be_remade,
    never_killed,
    not_reached,
    pieces,
    random_kills,
    table_of,
)
from chaos_runs import ENGINES, SHAPES, EngineName, make_config, run_here
from compare_runs import compare_runs
from make_tiny_model import make_tiny_model
from online_po import fail_points
from online_po.config import Config

ROOT = Path(__file__).parents[1]
MARKER = "ONLINE_PO_CHAOS"
"""Set in every process of a run that is killed: what outlives it is known by it."""
STOPPED = 5
"""Exit status of a run that a guard stopped, and that is to be resumed."""
RAY_DIES_S = 30.0
"""Ray's processes end by themselves when they miss the one that started them; after so long they are helped."""


class Chaos:
    """Starts, kills and compares runs of one engine in a folder."""

    def __init__(self, engine: EngineName, folder: Path, limit_s: float) -> None:
        self.engine, self.folder, self.limit_s = engine, folder, limit_s
        self.in_process = engine in ("fakes", "local")
        self.outlived = 0
        """Processes of killed runs that had to be ended here."""
        # Not in `folder`: the paths of Ray's sockets must be short.
        self.ray = Path(tempfile.mkdtemp(prefix="chaos-ray-", dir="/tmp"))
        make_tiny_model(folder / "model")
        if self.in_process:
            warm_up(folder)

    # -- whole runs and trials ---------------------------------------------------------------------

    def whole(self, shape: str) -> Whole:
        """Makes the run that others are compared with, in a process of its own: another hash seed, nothing shared."""
        folder = self.folder / f"whole-{shape}"
        self._config(folder, shape)
        config, out = folder / "config.yaml", folder / "passed.json"
        command = [__file__, "--whole", str(config), "--engine", self.engine, "--out", str(out)]
        code = self._await(self._spawn(command, folder), folder)
        if code != 0:
            raise SystemExit(f"the run without kills ends with {code}:\n{(folder / 'log').read_text()[-4000:]}")
        return Whole(run=folder / "run", **json.loads(out.read_text()))

    def trial(self, number: int, shape: str, whole: Whole, kills: Sequence[Kill]) -> Trial:
        """Starts a run, kills it as often as asked, lets it end, and compares. Its folder stays if it is wrong."""
        folder = self.folder / f"trial-{number:04d}-{shape}"
        config, run = self._config(folder, shape), folder / "run"
        trial, whole_then = Trial(shape=shape, kills=list(kills)), list[tuple[Kill, dict[str, tuple[int, int]]]]()
        for kill in trial.kills:
            code = self._start(folder, config, kill)
            while code == STOPPED:
                code = self._start(folder, config, kill)
            if code == 0:
                break
            if code != -signal.SIGKILL:
                trial.wrong.append(f"{kill.row}: the run ends with {code}, see {folder / 'log'}")
                return trial
            kill.happened, kill.log = True, (folder / "log").stat().st_size
            whole_then.append((kill, pieces(run)))
            if kill.damage:
                flip_a_byte(run)
        code = STOPPED
        while code == STOPPED:
            code = self._start(folder, config, None)
        if code != 0:
            trial.wrong.append(f"the resumed run ends with {code}, see {folder / 'log'}")
            return trial
        trial.wrong += self._differences(whole.run, run)
        at_end = pieces(run)
        damaged = any(kill.damage for kill in trial.kills)
        for kill, then in whole_then:
            count_pieces(kill, then, at_end)
            wasted = [name for name in kill.redone if not may_be_remade(name, then)]
            if wasted and not damaged:
                trial.wrong.append(f"{kill.row}: durable, but made again: {', '.join(wasted[:5])}")
        count_steps([kill for kill, _ in whole_then], (folder / "log").read_bytes())
        if not trial.wrong:
            shutil.rmtree(folder)
        return trial

    # -- processes ---------------------------------------------------------------------------------

    def _config(self, folder: Path, shape: str) -> Config:
        """The config of a run in a folder of its own, where it is also a file."""
        folder.mkdir()
        config = make_config(folder, shape, self.engine, self.folder / "model")
        (folder / "config.yaml").write_text(config.to_yaml())
        return config

    def _start(self, folder: Path, config: Config, kill: Kill | None) -> int:
        """Runs a config, or the rest of it, until it ends or is killed; gives the exit status as `Popen.returncode`
        does, and a large one where it hangs."""
        point = kill.point if kill is not None else None
        if self.in_process:

            def work() -> int:
                if point is not None:
                    fail_points.arm(point)
                return 0 if run_here(config, self.engine) else STOPPED

            pid = fork(work, folder / "log")
        else:
            run = folder / "run"
            words = ["resume", str(run)] if (run / "run.json").exists() else ["run", str(folder / "config.yaml")]
            armed = {} if point is None else {fail_points.VARIABLE: point}
            pid = self._spawn(["-m", "online_po.cli", *words], folder, armed)
        return self._await(pid, folder, kill.seconds if kill is not None and point is None else None)

    def _spawn(self, words: Sequence[str], folder: Path, more: dict[str, str] | None = None) -> int:
        environment = {
            **os.environ,
            **(more or {}),
            MARKER: str(folder),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "scripts")]),
            "RAY_TMPDIR": str(self.ray),
        }
        log = (os.POSIX_SPAWN_OPEN, 1, str(folder / "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        both = [log, (os.POSIX_SPAWN_DUP2, 1, 2)]
        return os.posix_spawn(sys.executable, [sys.executable, *words], environment, file_actions=both, setsid=True)

    def _await(self, pid: int, folder: Path, kill_after: float | None = None) -> int:
        """Waits for a process, or kills its group after some seconds; then for all that it left."""
        code = wait_for(pid, self.limit_s if kill_after is None else kill_after)
        if code is None:
            # A fork has nobody beside it, and may not lead its group yet.
            (os.kill if self.in_process else os.killpg)(pid, signal.SIGKILL)
            code = wait_for(pid, 60.0)
            if kill_after is None:
                code = 999
        if not self.in_process:
            self._end_what_is_left(folder)
        assert code is not None
        return code

    def _end_what_is_left(self, folder: Path) -> None:
        """Waits until Ray's processes of this run are gone, and ends those that stay. Others' are never touched."""
        deadline = time.monotonic() + RAY_DIES_S
        while (left := list(marked(folder))) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.outlived += len(left)
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=30)
        shutil.rmtree(self.ray)
        self.ray.mkdir()

    def _differences(self, whole: Path, run: Path) -> list[str]:
        """Compares in a child: this process, which is forked again and again, must start no threads."""
        told = run.parent / "differences.json"

        def work() -> int:
            told.write_text(json.dumps([str(difference) for difference in compare_runs(whole, run)]))
            return 0

        code = wait_for(fork(work, run.parent / "log"), 120.0)
        return json.loads(told.read_text()) if code == 0 else [f"comparing ends with {code}, see {run.parent / 'log'}"]


def fork(work: Callable[[], int], log: Path) -> int:
    """Does work in a child, its output in a file; gives the child's number. Its exit status is what work returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(pid: int, seconds: float) -> int | None:
    """The exit status of a child, negative for a signal; None if it still runs after so long."""
    descriptor = os.pidfd_open(pid)
    try:
        if not select.select([descriptor], [], [], seconds)[0]:
            return None
    finally:
        os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def marked(folder: Path) -> Iterator[psutil.Process]:
    """Processes of the run in a folder that are still there."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:  # gone, or somebody else's
            continue


def warm_up(folder: Path) -> None:
    """Imports and caches what a run does, so that a fork begins at once; leaves no thread behind. torch computes
    nothing here: a fork could then not."""
    import peft  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import actors.transformers_engine  # noqa: F401
    import online_po.learner  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=folder) as warm, redirect_stdout(io.StringIO()):
        run_here(make_config(Path(warm), "ahead", "fakes", folder / "model"), "fakes")


# -- what is told ----------------------------------------------------------------------------------


def show(trials: Sequence[Trial], chaos: Chaos) -> None:
    """Prints the table, and what is wrong."""
    shown = Table("fail point", "kills", "pieces reused", "pieces redone", "steps reused", "mismatches")
    for name, row in (table := table_of(trials)).items():
        shown.add_row(name, *(str(row[key]) for key in ("kills", "reused", "redone", "steps", "mismatches")))
    # A trial counts once in the sum, however often it was killed.
    totals = [sum(row[key] for row in table.values()) for key in ("kills", "reused", "redone", "steps")]
    wrong = [trial for trial in trials if trial.wrong]
    shown.add_section()
    shown.add_row(f"all, in {len(trials)} runs", *map(str, totals), str(len(wrong)))
    Console(width=100).print(shown)
    if not chaos.in_process:
        print(f"processes of killed runs that did not end within {RAY_DIES_S:.0f} s: {chaos.outlived}")
    for trial in wrong:
        print(f"{trial.shape}, killed at {', '.join(kill.point or 'random time' for kill in trial.kills)}:")
        print("".join(f"  {line}\n" for line in trial.wrong[:10]), end="")


def run_whole(config: Path, engine: EngineName, out: Path) -> None:
    """What the process of a run without kills does: runs it, and notes the points that it comes to."""
    passed: list[str] = []
    begin = time.monotonic()
    if engine in ("fakes", "local"):
        warm_up(config.parent.parent)
        begin = time.monotonic()
        fail_points.watch(passed.append)
        while not run_here(Config.from_yaml(config), engine):
            pass
    else:
        from online_po.launch import run

        fail_points.watch(passed.append)
        run(Config.from_yaml(config))
    out.write_text(json.dumps({"passed": passed, "seconds": time.monotonic() - begin}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--engine", choices=ENGINES, default="local", help="(%(default)s)")
    parser.add_argument("--trials", type=int, default=30, help="runs to kill (%(default)s)")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no further run after so long")
    parser.add_argument("--shape", choices=list(SHAPES), help="this kind of run only (all)")
    parser.add_argument(
        "--point", action="append", help="one run a shape, killed here (name[@kind][:nth]); may be given again"
    )
    parser.add_argument("--every-point", action="store_true", help="each fail point once, in place of random kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="parent of the folder to work in; one in memory is faster")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that one run may take (%(default)s)")
    parser.add_argument("--out", type=Path, help="also write the table here, as JSON")
    parser.add_argument("--whole", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.whole:
        run_whole(args.whole, args.engine, args.out)
        return
    if args.every_point and args.engine not in ("fakes", "local"):
        parser.error("--every-point is for --engine fakes or local: elsewhere points are in other processes")
    if args.folder is not None:
        args.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="chaos-", dir=args.folder))
    chaos, rng = Chaos(args.engine, folder, args.limit), random.Random(args.seed)
    wholes = {shape: chaos.whole(shape) for shape in ([args.shape] if args.shape else SHAPES)}
    planned: Iterable[tuple[str, list[Kill]]]
    if args.point:
        planned = ((shape, [Kill(point=point) for point in args.point]) for shape in wholes)
    elif args.every_point:
        planned = every_point(rng, wholes)
    else:
        shapes = (rng.choice(list(wholes)) for _ in range(args.trials))
        planned = ((shape, random_kills(rng, wholes[shape])) for shape in shapes)
    trials: list[Trial] = []
    end = time.monotonic() + 60 * args.minutes

    def run(planned: Iterable[tuple[str, list[Kill]]]) -> None:
        for shape, kills in planned:
            if time.monotonic() > end:
                break
            trials.append(chaos.trial(len(trials), shape, wholes[shape], kills))
            wrong = "; ".join(trials[-1].wrong[:1])
            places = [kill.point or round(kill.seconds, 2) for kill in kills]
            print(f"{len(trials)} {shape} {places} {wrong}", flush=True)

    run(planned)
    if args.every_point:
        run(not_reached(trials))
    shutil.rmtree(chaos.ray)
    show(trials, chaos)
    missing = never_killed(trials, args.engine) if args.every_point else []
    if args.point:
        missing = [kill.row for trial in trials for kill in trial.kills if not kill.happened]
    if missing:
        print(f"no run died at {', '.join(missing)}")
    if args.out:
        args.out.write_text(json.dumps({"engine": args.engine, "runs": len(trials), "points": table_of(trials)}))
    failed = bool(missing) or any(trial.wrong for trial in trials)
    if not failed:
        shutil.rmtree(folder)
    else:
        print(f"kept: {folder}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
