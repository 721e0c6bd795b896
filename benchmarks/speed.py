"""Training steps per second of the scripts, and of a peer's counterpart with the same sizes.

    python benchmarks/speed.py --scripts ppo --repeats 5
    python benchmarks/speed.py --scripts a3c_nstep --presets workers

Ours and theirs alternate, each in a process of its own with one torch thread. Only the training loop is
timed, without imports and construction (for a3c_nstep.py with those of its workers). With its own defaults a
script is measured alone. For a3c_nstep.py the other side can be itself with one worker.
"""

import csv
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import tyro

SIZES = ("num_workers", "num_envs", "num_steps", "update_epochs", "num_minibatches")


class Peer(NamedTuple):
    name: str  # module and class
    num_envs: int
    arguments: dict  # of the class
    flags: str  # of our script, for the same sizes


NETS = dict(gamma=0.99, policy_kwargs=dict(net_arch=[64, 64]))
RAW = " --no-normalize-rewards"  # as the peers, which scale nothing
PEERS = {
    "ppo": Peer(  # CleanRL's sizes
        "stable_baselines3.PPO",
        4,
        dict(n_steps=128, n_epochs=4, batch_size=128, **NETS),
        "--num-envs 4 --num-steps 128 --update-epochs 4 --value-epochs 4 --num-minibatches 4" + RAW,
    ),
    "vpg_gae": Peer(
        "stable_baselines3.A2C",
        16,
        dict(n_steps=32, gae_lambda=0.95, **NETS),
        "--num-envs 16 --num-steps 32 --value-epochs 1 --num-minibatches 1" + RAW,
    ),
    "trpo": Peer(  # the peer's defaults at 8 x 128
        "sb3_contrib.TRPO",
        8,
        dict(n_steps=128, batch_size=128, n_critic_updates=10, cg_max_steps=15, **NETS),
        "--num-envs 8 --num-steps 128 --value-epochs 10 --num-minibatches 8 --cg-iters 15" + RAW,
    ),
}


@dataclass
class Args:
    scripts: tuple[str, ...] = ("ppo",)
    """names of scripts, without .py"""
    presets: tuple[Literal["peer", "defaults", "workers"], ...] = ("peer", "defaults")
    """peer: the sizes shared with a peer; defaults: the script's own; workers: two against one"""
    env_id: str = "CartPole-v1"
    """gymnasium environment"""
    total_timesteps: int = 100_000
    """environment steps of each run"""
    repeats: int = 3
    """runs of each side, at least 3; the table has their median, minimum and maximum"""
    json: Path | None = None
    """file to store the numbers in"""


def measure_script(script, flags, args):
    """One run of our script; returns its steps per second and its arguments."""
    with tempfile.TemporaryDirectory() as runs_dir:
        command = [sys.executable, Path(__file__).parents[1] / f"{script}.py", "--env-id", args.env_id]
        command += ["--runs-dir", runs_dir, "--total-timesteps", str(args.total_timesteps), *flags.split()]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            sys.exit(run.stderr)
        run_dir = next(Path(runs_dir).iterdir())
        *_, last = csv.DictReader(open(run_dir / "progress.csv"))
        return float(last["step"]) / float(last["seconds"]), json.loads((run_dir / "args.json").read_text())


def train_peer(peer, env_id, total_timesteps):
    """Steps per second of model.learn(), in a DummyVecEnv that records episode returns, as ours does."""
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    module, name = peer.name.split(".")
    algorithm = getattr(importlib.import_module(module), name)
    model = algorithm("MlpPolicy", make_vec_env(env_id, peer.num_envs), device="cpu", **peer.arguments)
    start = time.time()
    model.learn(total_timesteps)
    return model.num_timesteps / (time.time() - start)


def measure_peer(peer, args):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(train_peer, peer, args.env_id, args.total_timesteps).result()


def cpu_model():
    info = open("/proc/cpuinfo") if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return names[0] if names else platform.processor()


def spread(speeds):
    return f"{median(speeds):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})"


def main(args):
    if args.repeats < 3:
        sys.exit("speed.py: --repeats must be at least 3")
    rows = []
    print("| script | sizes | steps/s | other | its steps/s | ratio |\n|---|---|---|---|---|---|")
    for script, preset in itertools.product(args.scripts, args.presets):
        peer = PEERS.get(script) if preset == "peer" else None
        if preset == "peer" and not peer or preset == "workers" and script != "a3c_nstep":
            continue
        flags = peer.flags if peer else "--num-workers 2" if preset == "workers" else ""
        other = {"peer": peer and peer.name, "workers": "1 worker", "defaults": ""}[preset]
        ours, theirs = [], []
        for _ in range(args.repeats):
            speed, used = measure_script(script, flags, args)
            ours.append(speed)
            if preset == "workers":
                theirs.append(measure_script(script, "--num-workers 1", args)[0])
            elif peer and importlib.util.find_spec(peer.name.split(".")[0]):
                theirs.append(measure_peer(peer, args))
        sizes = ", ".join(f"{used[name]} {name.split('_')[1]}" for name in SIZES if name in used)
        their_speed = spread(theirs) if theirs else "not installed" if peer else ""
        ratio = f"{median(ours) / median(theirs):.2f}" if theirs else ""
        print(f"| {script} | {sizes} | {spread(ours)} | {other} | {their_speed} | {ratio} |", flush=True)
        rows.append({"script": script, "preset": preset, "arguments": used, "ours": ours, "theirs": theirs})
    machine = {"cores": os.cpu_count(), "cpu": cpu_model(), "python": platform.python_version()}
    packages = ("torch", "gymnasium", "stable-baselines3", "sb3-contrib")
    machine |= {name: version(name) for name in packages if importlib.util.find_spec(name.replace("-", "_"))}
    print("\n" + ", ".join(f"{name} {value}" for name, value in machine.items()))
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "machine": machine}, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
