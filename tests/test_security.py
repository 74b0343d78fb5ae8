"""What lies in a run folder cannot execute code; what is in the environment comes into no file; Ray is on loopback."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors import cluster
from judges.runtime import LocalJudgePool
from online_po import launch, report
from online_po.cli import app
from online_po.config import Config
from online_po.errors import LedgerError, OnlinePOError
from online_po.ledger import Ledger
from online_po.loop import run_rounds
from online_po.policy_model import load_causal_lm
from online_po.types import Policy
from tests.fake_run import faked
from tests.fakes import make_config
from tests.test_loop import ASKED, make_parts

# -- nothing that is loaded executes ------------------------------------------------------------------------


class Bomb:
    """Whoever unpickles it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def payloads(mark: Path) -> dict[str, bytes]:
    """Files that execute when they are loaded by what would load such a name carelessly."""
    import io

    import numpy as np
    import torch

    zipped, array = io.BytesIO(), io.BytesIO()
    torch.save(Bomb(mark), zipped)
    np.save(array, np.array([Bomb(mark)], dtype=object), allow_pickle=True)
    bare = pickle.dumps(Bomb(mark))
    code = f"import os\nos.system('touch {mark}')\n".encode()
    yaml = f"!!python/object/apply:os.system ['touch {mark}']\n".encode()
    return {"bin": zipped.getvalue(), "pt": bare, "npy": array.getvalue(), "py": code, "yaml": yaml}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model) -> Path:
    """A run with two committed rounds of a real policy's folder and trainer state."""
    import torch

    from online_po.learner import TorchLearner
    from online_po.sections import LearnerConfig, ModelConfig

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    config = make_config(folder, model={"path": str(tiny_model)}, checkpoint__keep=None)
    learner = TorchLearner(ModelConfig(path=str(tiny_model)), LearnerConfig(), config.loss, seed=0, rounds=2)
    parts = make_parts(config)
    fake = parts.learner

    def save_policy(round_: int, folder: Path) -> dict[str, str]:
        fake.__class__.save_policy(fake, round_, folder)
        return learner.save_policy(round_, folder)

    def save_trainer(round_: int, folder: Path) -> dict[str, str]:
        fake.__class__.save_trainer(fake, round_, folder)
        return learner.save_trainer(round_, folder)

    parts.learner.save_policy, parts.learner.save_trainer = save_policy, save_trainer
    run_rounds(parts)
    return parts.ledger.root


def attempts(root: Path, start: Path) -> None:
    """All that reads a run folder. Each may refuse; none may execute."""
    from online_po.learner import TorchLearner
    from online_po.sections import LearnerConfig, ModelConfig

    model = ModelConfig(path=str(start))
    config = make_config(root.parent, model={"path": str(start)}, checkpoint__keep=None)
    ledger = Ledger(root)
    for command in (["status"], ["report"], ["verify"], ["export", "OUT"], ["pairs", "OUT.parquet"]):
        name, *out = command
        CliRunner().invoke(app, [name, str(root), *(str(root.parent / o) for o in out)])
    with suppress(OnlinePOError), faked():
        launch.resume(root)
    with suppress(OnlinePOError):
        policy = ledger.policy(3, start)
        ledger.verify(3, "trainer")
        learner = TorchLearner(model, LearnerConfig(), config.loss, seed=0, rounds=2)
        learner.load(policy, ledger.round_dir(3) / "trainer")
    with suppress(OnlinePOError):
        LocalJudgePool(make_config(root.parent, judge=ASKED).judge, ledger.judge_cache).close()


ROUND = "rounds/000003"
PLACES = [
    (f"{ROUND}/policy/pytorch_model.bin", "bin"),
    (f"{ROUND}/policy/adapter_model.bin", "bin"),
    (f"{ROUND}/policy/model.safetensors", "bin"),
    (f"{ROUND}/policy/model.safetensors", "pt"),
    (f"{ROUND}/policy/modeling_llama.py", "py"),
    (f"{ROUND}/trainer/optimizer.pt", "pt"),
    (f"{ROUND}/trainer/optimizer.safetensors", "pt"),
    (f"{ROUND}/trainer/trainer.json", "pt"),
    (f"{ROUND}/pairs.parquet", "pt"),
    (f"{ROUND}/prompts.npy", "npy"),
    (f"{ROUND}/prompts.parquet", "npy"),
    (f"{ROUND}/responses/part-00000.parquet", "pt"),
    (f"{ROUND}/eval.parquet", "pt"),
    (f"{ROUND}/metrics.jsonl", "pt"),
    (f"{ROUND}/COMMIT.json", "pt"),
    ("config.yaml", "yaml"),
    ("run.json", "pt"),
    ("timeline.jsonl", "pt"),
    ("judge_cache.sqlite", "pt"),
    ("sitecustomize.py", "py"),
    ("online_po.py", "py"),
]


@pytest.mark.parametrize(("place", "kind"), PLACES)
def test_what_is_planted_in_a_run_folder_does_not_execute(trained, tiny_model, tmp_path, monkeypatch, place, kind):
    root, mark = tmp_path / "fake", tmp_path / "executed"
    shutil.copytree(trained, root)
    (root / place).write_bytes(payloads(mark)[kind])
    monkeypatch.setattr(report, "render", lambda view: "")
    attempts(root, tiny_model)
    assert not mark.exists()


def test_the_payloads_would_execute(tmp_path):
    """By what our code never calls."""
    import numpy as np
    import torch
    import yaml

    loads = {
        "bin": lambda path: torch.load(path, weights_only=False),
        "pt": lambda path: pickle.loads(path.read_bytes()),
        "npy": lambda path: np.load(path, allow_pickle=True),
        "py": lambda path: exec(path.read_text()),
        "yaml": lambda path: yaml.unsafe_load(path.read_text()),
    }
    for kind, data in payloads(tmp_path / "mark").items():
        path = tmp_path / f"x.{kind}"
        path.write_bytes(data)
        loads[kind](path)
        assert (tmp_path / "mark").exists(), kind
        (tmp_path / "mark").unlink()


def test_weights_in_another_format_are_not_read_at_all(tiny_model, tmp_path):
    """Were the ledger's check not there."""
    import torch

    from online_po.sections import ModelConfig

    folder, mark = tmp_path / "model", tmp_path / "executed"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(payloads(mark)["bin"])
    with pytest.raises(OnlinePOError, match="safetensors"):
        load_causal_lm(ModelConfig(path=str(folder)), torch.float32)
    assert not mark.exists()


def test_a_policy_with_a_file_too_many_is_refused(trained, tmp_path):
    root = tmp_path / "fake"
    shutil.copytree(trained, root)
    (root / ROUND / "policy/pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(LedgerError, match="was not there at the commit"):
        Ledger(root).policy(3, tmp_path)
    assert isinstance(Ledger(root).policy(2, tmp_path), Policy)


# -- secrets ------------------------------------------------------------------------------------------------

SECRETS = {
    "OPENAI_API_KEY": "sk-proj-5ecre7000000000000000001",
    "HF_TOKEN": "hf_5ecre7000000000000000002",
    "WANDB_API_KEY": "5ecre7000000000000000003",
    "AWS_SECRET_ACCESS_KEY": "5ecre7/000000000000000004",
    "MY_OWN_PASSWORD": "5ecre7-000000000000000005",
}


def failing(prompt: list[dict[str, str]], response: str, metadata: dict[str, Any]) -> float:
    """A judge that fails now and then."""
    if len(response) % 7 == 0:
        raise RuntimeError("no")
    return float(response)


def test_secrets_in_the_environment_are_in_no_file_of_a_run(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    judge = {**ASKED, "function": "tests.test_security:failing", "max_failure_rate": 1.0}
    config = make_config(tmp_path, judge=judge, run={"name": "fake", "dir": str(tmp_path), "tensorboard": True})
    judges = LocalJudgePool(config.judge, Ledger(config.run_dir).judge_cache)
    with faked(judges=judges):
        launch.run(config)  # its report is the real one
    judges.close()
    CliRunner().invoke(app, ["status", str(config.run_dir)])
    read = [path for path in config.run_dir.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in read}
    assert {".yaml", ".json", ".jsonl", ".parquet", ".html", ".sqlite"} <= kinds and len(read) > 50
    for path in read:
        data = path.read_bytes()
        for name, value in SECRETS.items():
            assert value.encode() not in data, f"{name} is in {path}"


def test_the_key_of_an_endpoint_is_named_but_not_written(tmp_path, monkeypatch):
    """Not by what a server says of it either; see tests/judges/test_endpoint.py for its answers."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRETS["OPENAI_API_KEY"])
    config = Config.parse(
        make_config(tmp_path).model_dump(mode="json", exclude={"judge"}, exclude_unset=True)
        | {"judge": {"kind": "llm_score", "model": "m", "api_key_env": "OPENAI_API_KEY"}}
    )
    ledger = Ledger(config.run_dir)
    ledger.begin(config, {})
    text = (ledger.root / "config.yaml").read_text()
    assert "OPENAI_API_KEY" in text and SECRETS["OPENAI_API_KEY"] not in text


# -- loopback -----------------------------------------------------------------------------------------------


def test_ray_of_our_own_is_bound_to_loopback(monkeypatch):
    """And what it starts ignores the signal that is meant for us; ours come back."""
    from ray._private.services import get_node_ip_address

    asked: dict[str, Any] = {}

    def init(**settings: Any) -> None:
        asked.update(settings, usr1=signal.getsignal(signal.SIGUSR1), node=get_node_ip_address())
        signal.signal(signal.SIGTERM, lambda *_: os._exit(15))  # as Ray does

    monkeypatch.setattr(cluster.ray, "init", init)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    cluster.start(make_config(Path("/tmp")).ray)
    assert (asked["address"], asked["node"], asked["include_dashboard"]) == ("local", "127.0.0.1", False)
    assert asked["usr1"] == signal.SIG_IGN
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
    asked.clear()
    cluster.start(make_config(Path("/tmp"), ray={"address": "10.0.0.1:6379"}).ray)
    assert asked["address"] == "10.0.0.1:6379" and asked["node"] != "127.0.0.1"


def test_ranks_meet_on_their_nodes_address_alone():
    import psutil

    from actors.learners import make_store

    store = make_store("127.0.0.1", 1)
    store.set("key", "value")
    assert store.get("key") == b"value"
    own = psutil.Process().net_connections(kind="inet")
    assert {c.laddr.ip for c in own if c.status == psutil.CONN_LISTEN and c.laddr.port == store.port} == {"127.0.0.1"}


LISTENING = """
import os, sys
import psutil, ray
from actors import cluster
from actors.learners import LearnerGroup
from tests.fakes import make_config
from pathlib import Path
config = make_config(Path("/tmp"), model__path=sys.argv[1], learner__ranks=2, learner__global_batch_size=2)
cluster.start(config.ray)
group = LearnerGroup(config)
group.ready(120)
# Where the host's name leads to loopback anyway, what they listen on would not show it.
for rank in group._ranks:
    assert ray.get(rank.__ray_call__.remote(lambda _: os.environ["GLOO_SOCKET_IFNAME"])) == "lo"
for process in psutil.Process().children(recursive=True):
    for connection in process.net_connections(kind="inet"):
        if connection.status == psutil.CONN_LISTEN:
            print("listens", process.name().replace(" ", "_"), connection.laddr.ip)
group.close()
cluster.stop()
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_no_process_of_ray_listens_beyond_loopback(tiny_model):
    """Of two learner ranks either, which meet and talk through torch."""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", LISTENING, str(tiny_model)],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # Among it, what Ray shows of its actors.
    listening = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("listens ")]
    assert sum(name.startswith("ray::_Rank") for name, _ in listening) >= 2, done.stdout
    assert {address for *_, address in listening} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, done.stdout
