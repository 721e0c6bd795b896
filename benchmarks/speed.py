"""Training steps per second of the scripts, and of others with the same sizes.

    python benchmarks/speed.py --scripts ppo vpg_gae trpo              # against Stable-Baselines3
    git clone https://github.com/vwxyzjn/cleanrl
    python benchmarks/speed.py --scripts ppo --cleanrl cleanrl         # and against CleanRL
    python benchmarks/speed.py --scripts ppo npg --against ../old      # another checkout of this repository
    python benchmarks/speed.py --scripts ppo --against ../old --flags="--num-envs 4 --num-steps 128"

The two sides alternate, each in a process of its own with one torch thread. Only the training loop is timed,
without imports and construction (for a3c_nstep.py with those of its workers).
"""

import csv
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import tyro
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

sys.path.insert(0, str(Path(__file__).resolve().parent))

from run import ROOT, SCRIPTS, machine, versions

# against another checkout, whose defaults may be others
SIZES = dict.fromkeys(SCRIPTS, "--num-envs 32 --num-steps 32") | dict.fromkeys(SCRIPTS[:3], "--num-envs 32")
SIZES["a3c_nstep"] = "--num-workers 2 --num-envs 1 --num-steps 20"
NETS = dict(gamma=0.99, policy_kwargs=dict(net_arch=[64, 64]))
PEERS = {  # script: the peer's class, its environments and arguments, and our flags for the same sizes
    "ppo": (  # CleanRL's sizes
        "stable_baselines3.PPO",
        dict(num_envs=4, n_steps=128, n_epochs=4, batch_size=128, **NETS),
        "--num-envs 4 --num-steps 128 --update-epochs 4 --value-epochs 4 --num-minibatches 4",
    ),
    "vpg_gae": (
        "stable_baselines3.A2C",
        dict(num_envs=16, n_steps=32, gae_lambda=0.95, **NETS),
        "--num-envs 16 --num-steps 32 --value-epochs 1 --num-minibatches 1",
    ),
    "trpo": (  # the peer's defaults at 8 x 128; in the package sb3-contrib
        "sb3_contrib.TRPO",
        dict(num_envs=8, n_steps=128, batch_size=128, n_critic_updates=10, cg_max_steps=15, **NETS),
        "--num-envs 8 --num-steps 128 --value-epochs 10 --num-minibatches 8 --cg-iters 15",
    ),
}


@dataclass
class Args:
    scripts: tuple[str, ...] = ("ppo",)  # files without .py
    against: Path | None = None  # another checkout of this repository
    cleanrl: Path | None = None  # a checkout of CleanRL, for ppo
    flags: str = ""  # of our script, and with --against of both; none are its defaults, or SIZES in this file
    env_id: str = "CartPole-v1"  # gymnasium environment
    total_timesteps: PositiveInt = 100_000  # environment steps of each run
    repeats: PositiveInt = 5  # runs of each side; the table has their median, minimum and maximum


def run(*command, cwd):
    """The standard output of a Python script, which is run in the folder cwd."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def time_script(path, flags, args):
    """Steps per second of one run of a script of ours."""
    budget = "--env-id", args.env_id, "--total-timesteps", args.total_timesteps
    with tempfile.TemporaryDirectory() as folder:
        run(path, *budget, *flags.split(), "--runs-dir", folder, cwd=folder)
        *_, last = csv.DictReader(open(next(Path(folder).glob("*/progress.csv"))))
    return float(last["step"]) / float(last["seconds"])


def time_cleanrl(args):
    """What CleanRL's ppo.py says of itself, in its default sizes: those of PEERS."""
    path, budget = args.cleanrl.resolve() / "cleanrl" / "ppo.py", ("--total-timesteps", args.total_timesteps)
    with tempfile.TemporaryDirectory() as folder:
        output = run(path, "--env-id", args.env_id, *budget, cwd=folder)
    return float(output.rpartition("SPS:")[2].split()[0])


def train_peer(name, arguments, env_id, total_timesteps):
    """Steps per second of model.learn(), in a DummyVecEnv that records episode returns, as ours does."""
    import torch
    from stable_baselines3.common.env_util import make_vec_env

    torch.set_num_threads(1)
    module, name = name.split(".")
    algorithm = getattr(importlib.import_module(module), name)
    envs = make_vec_env(env_id, arguments.pop("num_envs"))
    model = algorithm("MlpPolicy", envs, device="cpu", **arguments)
    start = time.time()
    model.learn(total_timesteps)
    return model.num_timesteps / (time.time() - start)


def time_peer(name, arguments, args):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(train_peer, name, arguments, args.env_id, args.total_timesteps).result()


def comparisons(script, args):
    """Pairs to be timed: our flags, the other's name, and a function that times the other, or None."""
    if args.against:
        flags, path = args.flags or SIZES.get(script, ""), args.against.resolve()
        yield flags, path.name, lambda: time_script(path / f"{script}.py", flags, args)
        return
    if script in PEERS:
        name, arguments, flags = PEERS[script]
        installed = importlib.util.find_spec(name.split(".")[0])
        time_other = (lambda: time_peer(name, arguments, args)) if installed else None
        yield flags, name if installed else f"{name} is not installed", time_other
        if script == "ppo" and args.cleanrl:
            yield flags, "CleanRL", lambda: time_cleanrl(args)
    if script == "a3c_nstep":
        one = "--num-workers 1"
        yield "--num-workers 2", one, lambda: time_script(ROOT / "a3c_nstep.py", one, args)
    yield args.flags, "", None


def spread(speeds):
    return f"{median(speeds):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})" if speeds else ""


def main(args):
    packages = versions("torch", "gymnasium", "stable_baselines3", "sb3_contrib")
    print(
        f"{args.env_id}, {args.total_timesteps:,} steps, median of {args.repeats}; {machine()}; {packages}\n"
    )
    print("| script | flags | steps/s | other | its steps/s | ratio |\n|---|---|---|---|---|---|")
    for script in args.scripts:
        for flags, name, time_other in comparisons(script, args):
            ours, theirs = [], []
            for _ in range(args.repeats):
                ours.append(time_script(ROOT / f"{script}.py", flags, args))
                theirs += [time_other()] if time_other else []
            ratio = f"{median(ours) / median(theirs):.2f}" if theirs else ""
            cells = script, flags or "defaults", spread(ours), name, spread(theirs), ratio
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
