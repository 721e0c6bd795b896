"""Play, show or film the trained policy of a run folder; load() gives it to your own code.

python tools/enjoy.py runs/ppo__CartPole-v1__1__20260131-120000-000000 --episodes 20 --deterministic
"""
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6,<2.14", "gymnasium[mujoco]>=1.1,<2", "pydantic", "tyro>=1.0.16", "tensorboard",
#                 "tqdm", "pygame", "moviepy"]
# ///

import json
import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch
import tyro
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    run_dir: tyro.conf.Positional[str]  # run folder of a script
    script: str | None = None  # the script, MY_PPO.py, if it is not found by its name
    episodes: PositiveInt = 10  # episodes to play
    seed: NonNegativeInt = 1  # of the environment and of the action sampling
    deterministic: bool = False  # take the mode of the distribution instead of a sample
    render: bool = False  # show the episodes in a window
    video: str | None = None  # film the episodes to this file, FILE.mp4
    output: str | None = None  # write the returns and their mean to this file, FILE.json


class SingleEnv(gym.Env):
    """One environment, wrapped as a script wraps N; observations are float32, as in its rollouts."""

    def __init__(self, envs):
        self.envs, self.metadata, self.render_mode = envs, envs.metadata, envs.render_mode
        self.observation_space, self.action_space = envs.single_observation_space, envs.single_action_space
        self.render, self.close = lambda: envs.render()[0], envs.close

    def reset(self, **kwargs):
        obs, info = self.envs.reset(**kwargs)
        return obs[0].astype(np.float32), info

    def step(self, action):
        obs, *outcome, info = self.envs.step(np.asarray(action).reshape(self.envs.action_space.shape))
        return obs[0].astype(np.float32), *(x.item() for x in outcome), info


def load(run_dir, script=None, render_mode=None):
    """The policy of a run folder and an environment for it; raises ValueError at a folder that is none.

    script: its path; otherwise it is looked for by its name beside the folder of runs, in the working
    directory, and in this repository. It is run, as is my_module for the environment my_module:MyEnv-v0.
    """
    path = Path(run_dir, "checkpoint.pt")
    checkpoint = torch.load(path, "cpu", weights_only=True) if path.exists() else {}
    args = checkpoint.get("args", {})
    if "script" not in args:
        raise ValueError(f"{run_dir} is not a run folder")
    folders = [Path(run_dir).resolve().parent.parent, Path.cwd(), ROOT, ROOT / "variants"]
    paths = [Path(script)] if script else [folder / Path(f"{args['script']}.py").name for folder in folders]
    path = next(filter(Path.is_file, paths), None)
    if path is None:
        raise ValueError(f"no {' or '.join(map(str, paths))}: say by --script where that of {run_dir} is")
    sys.path += [str(path.resolve().parent), os.getcwd()]  # for the modules of environments
    code = runpy.run_path(str(path), run_name=path.stem)
    if render_mode:  # make_envs takes none, but a specification that has one
        args["env_id"] = gym.make(args["env_id"], render_mode=render_mode).spec
    env = SingleEnv(code["make_envs"](SimpleNamespace(**args | dict(num_envs=1, vectorization="sync"))))
    policy = code["Policy"](env.observation_space, env.action_space)
    policy.load_state_dict(checkpoint["policy"])
    return policy.eval().requires_grad_(False), env


def play(env, policy, args):
    """Play, show and film the episodes; returns the return and the length of each."""
    if args.video:
        from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter  # slow, and not always there

        env.reset()
        video = FFMPEG_VideoWriter(args.video, env.render().shape[1::-1], env.metadata.get("render_fps", 30))
    episodes = []
    for i in range(args.episodes):
        obs, total, length, done = env.reset(seed=None if i else args.seed)[0], 0, 0, False
        state = torch.zeros(2, 1, policy.lstm.hidden_size) if hasattr(policy, "lstm") else None
        while not done:
            if state is None:
                dist = policy(torch.from_numpy(obs))
            else:  # a recurrent policy takes (T, N, O)
                same_episode = torch.ones(1, 1, dtype=torch.bool)
                dist, state = policy(torch.from_numpy(obs)[None, None], same_episode, state)
            obs, reward, *ends, _ = env.step(dist.mode if args.deterministic else dist.sample())
            total, length, done = total + reward, length + 1, any(ends)
            if args.video:
                video.write_frame(env.render())
        print(f"episode {i + 1}: return {total:g}, length {length}", flush=True)
        episodes.append((total, length))
    if args.video:
        video.close()
    return zip(*episodes)


def summarize(returns):
    """The mean, the sample deviation (NaN of one return), and the mean's 95% interval by the bootstrap."""
    samples = np.random.default_rng(0).choice(returns, (10_000, len(returns)))
    low, high = np.quantile(samples.mean(1), (0.025, 0.975))
    return float(np.mean(returns)), float(np.std(returns, ddof=1)) if len(returns) > 1 else np.nan, low, high


def main(args):
    """Play; raises ValueError at what cannot be played or shown."""
    if args.video and (args.render or Path(args.video).suffix != ".mp4"):
        raise ValueError(f"--video {args.video} must be an .mp4 file, and goes without --render")
    if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"} & set(os.environ):
        if args.render:  # MuJoCo would abort, pygame would draw nowhere
            raise ValueError("--render needs a display; --video FILE.mp4 needs none")
        os.environ.setdefault("MUJOCO_GL", "egl")
    policy, env = load(args.run_dir, args.script, "human" if args.render else args.video and "rgb_array")
    torch.manual_seed(args.seed)
    with env:
        returns, lengths = play(env, policy, args)
    mean, deviation, low, high = summarize(returns)
    print(f"mean {mean:g}, deviation {deviation:g}, 95% interval of the mean {low:g} to {high:g}")
    if args.output:
        result = dict(run_dir=args.run_dir, deterministic=args.deterministic, seed=args.seed, mean=mean)
        result |= dict(returns=returns, lengths=lengths, deviation=deviation, interval=[low, high])
        result |= {"deviation": None, "interval": None} if len(returns) == 1 else {}  # JSON has no NaN
        Path(args.output).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
