"""Play the trained policy of a run folder: print its returns, show it in a window, or film it.

    python tools/enjoy.py runs/ppo__CartPole-v1__1__20260131-120000-000000 --render

It needs the script that made the run folder, in the repository that this file lies in.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<2.14", "gymnasium[mujoco]>=1.1,<2", "pydantic", "tyro>=1.0.16", "tensorboard", "tqdm",
#     "pygame", "moviepy",
# ]
# ///

import importlib.util
import os
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    run_dir: tyro.conf.Positional[str]  # run folder of a script of this repository
    episodes: PositiveInt = 10  # episodes to play
    seed: NonNegativeInt = 1  # of the environment and of the action sampling
    deterministic: bool = False  # take the mode of the distribution instead of a sample
    render: bool = False  # show the episodes in a window
    video: str | None = None  # film the episodes to this file, FILE.mp4


def load_run(run_dir):
    """The Policy class of the script, the environment's id and the weights of a run folder."""
    path = Path(run_dir, "checkpoint.pt")
    checkpoint = torch.load(path, "cpu", weights_only=True) if path.exists() else {}
    name, env_id = (checkpoint.get("args", {}).get(key) for key in ("script", "env_id"))
    if name is None:
        raise ValueError(f"{run_dir} is not a run folder")
    scripts = {path.stem: path for path in (*ROOT.glob("*.py"), *ROOT.glob("variants/*.py"))}
    if name not in scripts:
        raise ValueError(f"{run_dir} is of {name}.py, which is not in {ROOT}")
    spec = importlib.util.spec_from_file_location(name, scripts[name])
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.Policy, env_id, checkpoint["policy"]


def make_env(env_id, render_mode):
    """One environment, wrapped as the scripts wrap N of them."""
    env = gym.make(env_id, **({"render_mode": render_mode} if render_mode else {}))
    env = gym.wrappers.FlattenObservation(env)
    if isinstance(env.action_space, gym.spaces.Discrete):
        start = env.action_space.start
        return gym.wrappers.TransformAction(env, lambda action: action + start, env.action_space)
    return gym.wrappers.ClipAction(env)


@torch.no_grad()
def play(env, policy, args):
    """Yield the return and the length of each episode."""
    with ExitStack() as stack:
        for episode in range(args.episodes):
            obs, _ = env.reset(seed=args.seed if episode == 0 else None)
            if args.video and episode == 0:
                from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter  # slow, and not always there

                size, fps = env.render().shape[1::-1], env.metadata.get("render_fps", 30)
                video = stack.enter_context(closing(FFMPEG_VideoWriter(args.video, size, fps)))
            rewards, done = [], False
            while not done:
                dist = policy(torch.as_tensor(obs, dtype=torch.float32))
                action = (dist.mode if args.deterministic else dist.sample()).numpy()
                obs, reward, terminated, truncated, _ = env.step(action.reshape(env.action_space.shape))
                rewards.append(float(reward))
                done = terminated or truncated
                if args.video:
                    video.write_frame(env.render())
            yield sum(rewards), len(rewards)


def main(args):
    """Play; raises ValueError at what cannot be played or shown."""
    if args.video and (args.render or Path(args.video).suffix != ".mp4"):
        raise ValueError(f"--video {args.video} must be an .mp4 file, and goes without --render")
    displays = "DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"
    if sys.platform == "linux" and not any(map(os.environ.get, displays)):
        if args.render:  # MuJoCo would abort, pygame would draw nowhere
            raise ValueError("--render needs a display; --video FILE.mp4 needs none")
        os.environ.setdefault("MUJOCO_GL", "egl")
    make_policy, env_id, weights = load_run(args.run_dir)
    with closing(make_env(env_id, "human" if args.render else "rgb_array" if args.video else None)) as env:
        policy, returns = make_policy(env.observation_space, env.action_space), []
        policy.load_state_dict(weights)
        torch.manual_seed(args.seed)
        for episode_return, length in play(env, policy, args):
            returns.append(episode_return)
            print(f"episode {len(returns)}: return {episode_return:g}, length {length}", flush=True)
    print(f"mean {np.mean(returns):g} +- {np.std(returns):g} over {len(returns)} episodes")


if __name__ == "__main__":
    main(tyro.cli(Args))
