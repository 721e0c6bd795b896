"""How fast the scripts are beside others: steps per second, and seconds until a task is solved.

    python benchmarks/speed.py --scripts ppo vpg_gae                   # steps per second, with the same sizes
    python benchmarks/speed.py --scripts ppo npg --against ../old      # another checkout of this repository
    python benchmarks/speed.py --defaults --env-id HalfCheetah-v5 --total-timesteps 1000000 --cleanrl cleanrl
    python benchmarks/speed.py --solve --cleanrl cleanrl               # seconds until CartPole-v1 is solved

The others are Stable-Baselines3, where it is installed, and CleanRL, where --cleanrl has a checkout of it. It
was written for gymnasium 0.29, and one of its calls needs one more argument since 1.0:

    git clone https://github.com/vwxyzjn/cleanrl
    sed -i "s/np.clip(obs, -10, 10))/np.clip(obs, -10, 10), None)/" cleanrl/cleanrl/ppo_continuous_action.py

The sides alternate, each in a process of its own with one torch thread, on the CPU. Steps per second are of
training, without imports and construction (for a3c_nstep.py with those of its workers).
"""

import csv
import importlib.util
import inspect
import os
import pkgutil
import runpy
import subprocess
import sys
import time
from math import inf
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import gymnasium as gym
import numpy as np
import tyro
from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

sys.path.insert(0, str(Path(__file__).resolve().parent))

from run import ROOT, SCRIPTS, machine, versions

# against another checkout, whose defaults may be others
VALUE = "--value-epochs 10 --num-minibatches 4"
SIZES = dict.fromkeys(SCRIPTS[:3], "--num-envs 32")
SIZES |= dict.fromkeys(SCRIPTS[3:], f"--num-envs 16 --num-steps 32 {VALUE}")
SIZES |= {"reinforce_baseline": f"--num-envs 32 {VALUE}", "ppo": f"{SIZES['ppo']} --update-epochs 5"}
SIZES["a3c_nstep"] = f"--num-workers 2 --num-envs 8 --num-steps 32 {VALUE}"
PEERS = {  # script: a class with the same networks, its environments and arguments, our flags for these sizes
    "ppo": (  # CleanRL's sizes
        "stable_baselines3.PPO",
        dict(num_envs=4, n_steps=128, n_epochs=4, batch_size=128),
        "--num-envs 4 --num-steps 128 --update-epochs 4 --value-epochs 4 --num-minibatches 4",
    ),
    "vpg_gae": (
        "stable_baselines3.A2C",
        dict(num_envs=16, n_steps=32, gae_lambda=0.95),
        "--num-envs 16 --num-steps 32 --value-epochs 1 --num-minibatches 1",
    ),
}


@dataclass
class Args:
    scripts: tuple[str, ...] = ("ppo",)  # files without .py; for --solve of the step family
    against: Path | None = None  # another checkout of this repository, in place of the others
    cleanrl: Path | None = None  # a checkout of CleanRL, for ppo
    defaults: bool = False  # every side has its defaults, not the same sizes
    solve: bool = False  # so too, and stops when the mean return of 100 episodes is at the threshold
    threshold: float = 475  # of --solve
    flags: str = ""  # of our scripts; none are their defaults, or what this file has for the same sizes
    env_id: str = "CartPole-v1"  # gymnasium environment
    total_timesteps: PositiveInt = 100_000  # environment steps of each run; --solve has the default budgets
    repeats: PositiveInt = 5  # runs of each side, of the seeds 1, 2, ...


def call(function, *arguments):
    """Arguments of python that call the function, and import little more than every side does."""
    imports = "import os, pkgutil, runpy, sys, time, numpy as np"
    return ["-c", f"{imports}\n{SOURCES[function]}\n{function.__name__}(*{arguments!r})"]


def train_peer(name, arguments, env_id, total_timesteps, seed):
    """model.learn(), in a DummyVecEnv that records episode returns, as ours does."""
    from stable_baselines3.common.env_util import make_vec_env

    envs = make_vec_env(env_id, arguments.pop("num_envs"))
    model = pkgutil.resolve_name(name)("MlpPolicy", envs, seed=seed, **arguments)
    start = time.time()
    model.learn(total_timesteps)
    print("SPS:", model.num_timesteps / (time.time() - start))


def until_solved(command, recorder, threshold):
    """Do as python with this command, until the mean return of 100 episodes is at the threshold.

    recorder: the class that records the episodes there; training begins with its first step.
    """
    recorder, start, returns = pkgutil.resolve_name(recorder), [], []
    step = recorder.step

    def watched_step(self, action):
        start[:] = start or [time.time()]
        *outcome, info = step(self, action)
        if "episode" in info:  # its return; of a vector environment an array, and which of them ended
            for episode in np.atleast_1d(info["episode"]["r"])[info.get("_episode", slice(None))]:
                returns.append(episode)
                if len(returns) >= 100 and np.mean(returns[-100:]) >= threshold:
                    print("solved", time.time(), time.time() - start[0], flush=True)
                    os._exit(0)
        return *outcome, info

    recorder.step, sys.argv = watched_step, command
    exec(command[1], {}) if command[0] == "-c" else runpy.run_path(command[0], run_name="__main__")
    sys.exit(0 if start else f"{recorder} does not record its episodes")


SOURCES = {f: inspect.getsource(f) for f in (train_peer, until_solved)}  # the file may change while this runs


def sides(script, seed, args):
    """All that is compared, ours first: its name, its command, and the class that records its episodes."""
    options = ["--env-id", args.env_id, "--seed", str(seed)]
    options += [] if args.solve else ["--total-timesteps", str(args.total_timesteps)]
    peer, arguments, flags = PEERS.get(script, ("none", {}, ""))
    own = args.defaults or args.solve
    if own:  # an id alone is one environment of a peer
        arguments, flags = dict(num_envs=1), ""
    elif args.against:
        flags = SIZES.get(script, "")
    flags = args.flags or flags
    for path in [root.resolve() / f"{script}.py" for root in (ROOT, args.against) if root]:
        name = f"{script}.py {flags}".strip() if path == ROOT / f"{script}.py" else str(path)
        yield name, [str(path), *options, *flags.split()], "gymnasium.wrappers.vector.RecordEpisodeStatistics"
    if args.cleanrl and script == "ppo" and not args.against:
        # ppo.py has the sizes of PEERS; its sister for Box actions has others
        box = own and isinstance(gym.make(args.env_id).action_space, gym.spaces.Box)
        path = args.cleanrl.resolve() / "cleanrl" / f"ppo{'_continuous_action' * box}.py"
        yield f"CleanRL's {path.name}", [str(path), *options], "gymnasium.wrappers.RecordEpisodeStatistics"
    if importlib.util.find_spec(peer.split(".")[0]) and not args.against:
        steps = 500_000 if args.solve else args.total_timesteps  # it has no default: that of CleanRL
        command = call(train_peer, peer, arguments, args.env_id, steps, seed)
        yield peer, command, "stable_baselines3.common.monitor.Monitor"


def measure(command, recorder, args):
    """(steps per second,), or with --solve seconds (of the whole process, of training), inf if not solved."""
    if args.solve:
        command = call(until_solved, command, recorder, args.threshold)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.time()
    with TemporaryDirectory() as folder:
        options = dict(cwd=folder, env=environment, capture_output=True, text=True)
        done = subprocess.run([sys.executable, *command], **options)
        rows = [row for x in Path(folder).glob("runs/*/progress.csv") for row in csv.DictReader(open(x))]
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    if args.solve:
        _, solved, times = done.stdout.rpartition("solved ")
        end, training = map(float, times.split()) if solved else (inf, inf)
        return end - start, training
    if rows:  # ours
        return (float(rows[-1]["step"]) / float(rows[-1]["seconds"]),)
    return (float(done.stdout.rpartition("SPS:")[2].split()[0]),)


def spread(numbers):
    middle, low, high = (f"{x:,.{int(x < 100)}f}" for x in (median(numbers), min(numbers), max(numbers)))
    unsolved = sum(x == inf for x in numbers)
    return f"{middle} ({low}-{high})" + f", {unsolved} of {len(numbers)} not solved" * (unsolved > 0)


def main(args):
    goal = f"mean of 100 episodes at {args.threshold:g}" if args.solve else f"{args.total_timesteps:,} steps"
    packages = versions("torch", "gymnasium", "stable_baselines3")
    print(f"{args.env_id}, {goal}, median (range) of {args.repeats} seeds; {machine()}; {packages}\n")
    columns = "whole process, s | times slower | training loop, s" if args.solve else "steps/s"
    print(f"| side | {columns} | times slower |\n|---|---|---|{'---|---|' * args.solve}")
    for script in args.scripts:
        measured = {}
        for seed in range(1, args.repeats + 1):
            for name, command, recorder in sides(script, seed, args):
                measured.setdefault(name, []).append(measure(command, recorder, args))
        ours, *_ = measured.values()
        for name, theirs in measured.items():
            cells = [name]
            for x, y in zip(zip(*ours), zip(*theirs)):
                slower = median(y) / median(x) if args.solve else median(x) / median(y)
                cells += [spread(y), f"{slower:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
