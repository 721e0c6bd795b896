"""variants/ppo_torchrun.py: several processes do what one does with all of their data, and survive a kill."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from environments import Random
from gymnasium.spaces import Box
from test_run_folder import assert_same, assert_whole, only_run, progress, save_always, tiny

import ppo
from variants import ppo_torchrun as script

ALL = slice(0, 25), slice(0, 4)  # rows and environments
OWN = [(slice(0, 9), slice(0, 2)), (slice(9, 25), slice(2, 4))]  # of each of two processes


def results(module, rows, envs):
    """What the functions make of a part of the data: of its own, and what all processes have in common."""
    torch.manual_seed(0)
    nets = {
        "policy": module.Policy(Box(-9, 9, (3,)), Box(-9, 9, (2,))),
        "value": module.Value(Box(-9, 9, (3,))),
    }
    obs, advantages, returns = (torch.randn(25, *shape).double()[rows] for shape in [(3,), (), ()])
    rewards, valid = torch.randn(9, 4)[:, envs], (torch.rand(9, 4) < 0.8)[:, envs]
    obs = 1 + obs * torch.linspace(0, 3, 25).double()[rows, None]  # the KL of the first is far less
    actions, advantages = obs[:, 1:], module.normalize(advantages)
    own = {"advantages": advantages, "constant": module.normalize(torch.full_like(returns, 0.1))}
    own["rewards"] = module.RewardScale(rewards.shape[1], 0.9)(rewards, valid).T

    args, common = module.Args(num_minibatches=1, value_epochs=1, max_grad_norm=100, ent_coef=0.1), {}
    for name, net in nets.items():
        optimizer = torch.optim.Adam(net.double().parameters(), lr=1e-3)
        update = getattr(module, f"update_{name}")
        data = (actions, advantages) if name == "policy" else (returns,)
        for args.update_epochs, args.target_kl in [
            (1, None),
            (99, 0.005),
        ]:  # then until the KL of all stops it
            update(net, optimizer, obs, *data, args)
            gradient = torch.cat([param.grad.flatten() for param in net.parameters()])
            common[f"{name} {args.update_epochs}"] = gradient
        module.update_statistics(net.net, obs)
        common |= {f"{name} {key}": x.clone() for key, x in net.state_dict().items()}
        if module is script:  # as many minibatches of 9 rows as of 16; chunks for 4 would be but 3
            args.num_minibatches, args.update_epochs, args.target_kl = 4, 1, None
            update(net, optimizer, obs, *data, args)
            common[f"{name} minibatches"] = torch.nn.utils.parameters_to_vector(net.parameters()).detach()
            args.num_minibatches = 1
    return own, common


def compute(rank, path):
    store, timeout = torch.distributed.FileStore(f"{path}/store", 2), timedelta(seconds=10)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    torch.set_num_threads(1)
    torch.save(results(script, *OWN[rank]), f"{path}/{rank}.pt")


def test_two_processes_make_the_gradient_and_the_statistics_of_one_with_all_the_data(tmp_path):
    torch.multiprocessing.spawn(compute, args=[tmp_path], nprocs=2)
    (own, common), (other, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert_same(common, same)
    expected_own, expected = results(ppo, *ALL)
    assert all(
        expected[f"{name} {epochs}"].norm() > 0.1 for name in ("policy", "value") for epochs in (1, 99)
    )
    torch.testing.assert_close({name: common[name] for name in expected}, expected, rtol=1e-6, atol=1e-6)
    own = {name: torch.cat([x, other[name]]) for name, x in own.items()}
    torch.testing.assert_close(own, expected_own, rtol=1e-6, atol=1e-6)


def worker(path):
    """A process under torchrun, which notes what it has at every iteration; the fifth kills the second."""
    rank, restart = os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
    init, log, notes = script.Run.__init__, script.Run.log, []

    def note(iteration, step, modules):
        states = [modules[name].state_dict() for name in ("policy", "value", "reward_scale")]
        weights = b"".join(x.numpy().tobytes() for state in states for x in state.values())
        notes.append((iteration, step, hashlib.sha256(weights).hexdigest()))
        Path(path, f"{restart}-{rank}.json").write_text(json.dumps(notes))

    def note_and_init(run, args, envs, **modules):
        note(0, 0, modules)  # before they are those of a checkpoint
        init(run, args, envs, **modules)

    def log_and_note(run, *rest):
        if (rank, restart, run.iteration) == ("1", "0", 4):
            os.kill(os.getpid(), signal.SIGKILL)
        log(run, *rest)
        note(run.iteration, run.step, run.modules)

    script.Run.__init__ = note_and_init
    script.Run.log = log_and_note
    save_always(pytest.MonkeyPatch(), script)
    returns = script.train(tiny(script, f"{path}/runs", num_envs=6, total_timesteps=600)).returns
    done = dict(returns=returns, own=Random.returns, steps=len(Random.steps), seeds=Random.seeds)
    Path(path, f"done-{rank}.json").write_text(json.dumps(done))


@pytest.mark.skipif(sys.platform == "win32", reason="needs the signals of POSIX")
def test_weights_are_equal_on_all_processes_and_a_killed_one_costs_nothing(tmp_path):
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(ppo.__file__).parent)])
    environment = {"PYTHONPATH": paths, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", __file__, str(tmp_path)]
    made = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stderr
    notes = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(notes["0-1"]) == 5 and notes["0-0"][:5] == notes["0-1"] and notes["1-0"] == notes["1-1"]
    assert len({weights for _, _, weights in notes["1-0"]}) == len(notes["1-0"])
    saved = notes["1-0"][1][0] - 1  # the last checkpoint of the first, which may be ahead of the second
    assert 3 <= saved <= 5 and notes["1-0"][-1][1] >= 600

    run_dir = only_run(tmp_path / "runs")
    assert re.fullmatch(r"ppo_torchrun__environments-test-Random-v0__1__[\da-f-]{36}", run_dir.name)
    assert len(list(run_dir.glob("events*"))) == 2 and made.stdout.count("to go on: ") <= 2
    assert_whole(run_dir)
    rows, done, other = progress(run_dir), notes["done-0"], notes["done-1"]  # both count from the restart on
    assert len({*done["seeds"], *other["seeds"]}) == 6
    assert done["steps"] + other["steps"] == int(rows[-1]["step"]) - int(rows[saved - 1]["step"])
    episodes = int(rows[-1]["episodes"]) - int(rows[saved - 1]["episodes"])
    assert len(done["own"]) + len(other["own"]) == episodes
    assert done["returns"] == other["returns"] and len(done["returns"]) == 100
    for own in (done["own"], other["own"]):
        assert own[-1] in (pytest.approx(x, rel=1e-4) for x in done["returns"])


def test_without_torchrun_or_a_name_of_the_run_it_says_what_to_do(tmp_path, monkeypatch):
    for name in ("none", ""):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
        if not name:
            monkeypatch.delenv("TORCHELASTIC_RUN_ID")
        with pytest.raises(ValueError, match="start it with torchrun --standalone or"):
            script.train(tiny(script, tmp_path))
    assert list(tmp_path.iterdir()) == []


if __name__ == "__main__":
    worker(sys.argv[1])
