"""Play the trained policy of a run folder: print its returns, show it in a window, or film it.

    python tools/enjoy.py runs/ppo__CartPole-v1__1__20260131-120000-000000 --render

It needs the script that made the run folder, in the repository that this file lies in.
"""
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6,<2.14", "gymnasium[mujoco]>=1.1,<2", "numpy", "tyro>=0.9", "tensorboard", "tqdm", "pygame",
#     "moviepy",
# ]
# ///

import importlib.util
import json
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import gymnasium as gym
import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Args:
    run_dir: tyro.conf.Positional[str]
    """run folder of a script of this repository"""
    episodes: int = 10
    """episodes to play"""
    seed: int = 1
    """seed of the environment and of the action sampling"""
    deterministic: bool = False
    """take the mode of the distribution instead of a sample"""
    render: bool = False
    """show the episodes in a window"""
    video: str | None = None
    """film the episodes to this file, FILE.mp4"""


def refuse(message):
    """End for bad input: one line on standard error, exit code 2."""
    print(f"enjoy.py: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def load_run(run_dir):
    """The Policy class of the script, the environment's id and the weights of a run folder."""
    try:
        saved = json.loads(Path(run_dir, "args.json").read_text())
        path, env_id = ROOT / f"{saved['script']}.py", saved["env_id"]
        checkpoint = torch.load(Path(run_dir, "checkpoint.pt"), map_location="cpu", weights_only=True)
        weights = checkpoint["policy"]
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, EOFError, UnpicklingError) as error:
        refuse(f"{run_dir}: not a run folder: {type(error).__name__} {error}")
    if path not in ROOT.glob("*.py"):
        refuse(f"{run_dir}: made by {path.name}, which is not in {ROOT}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.Policy, env_id, weights


def make_env(env_id, render_mode):
    """One environment, wrapped as the scripts wrap N of them."""
    env = gym.make(env_id, render_mode=render_mode) if render_mode else gym.make(env_id)
    env = gym.wrappers.FlattenObservation(env)
    if isinstance(env.action_space, gym.spaces.Discrete):
        start = env.action_space.start
        return gym.wrappers.TransformAction(env, lambda action: action + start, env.action_space)
    return gym.wrappers.ClipAction(env)


@torch.no_grad()
def play(env, policy, args):
    """Yield the return and the length of each episode."""
    for episode in range(args.episodes):
        obs, _ = env.reset(seed=args.seed if episode == 0 else None)
        if args.video and episode == 0:
            from moviepy.video.io.ffmpeg_writer import FFMPEG_VideoWriter

            size, fps = env.render().shape[1::-1], env.metadata.get("render_fps", 30)
            writer = FFMPEG_VideoWriter(args.video, size, fps)
        rewards, done = [], False
        while not done:
            dist = policy(torch.as_tensor(obs, dtype=torch.float32))
            action = dist.mode if args.deterministic else dist.sample()
            obs, reward, terminated, truncated, _ = env.step(action.numpy().reshape(env.action_space.shape))
            rewards.append(float(reward))
            done = terminated or truncated
            if args.video:
                writer.write_frame(env.render())
        yield sum(rewards), len(rewards)
    if args.video:
        writer.close()


def main(args):
    """Play; raises SystemExit at bad input."""
    if args.episodes < 1 or args.seed < 0:
        refuse("--episodes must be at least 1, --seed at least 0")
    if args.video and (args.render or Path(args.video).suffix != ".mp4"):
        refuse(f"--video {args.video}: must be an .mp4 file, and goes without --render")
    displays = "DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"
    if sys.platform == "linux" and not any(map(os.environ.get, displays)):
        if args.render:  # MuJoCo would abort, pygame would draw nowhere
            refuse("--render: there is no display; --video FILE.mp4 needs none")
        os.environ.setdefault("MUJOCO_GL", "egl")
    make_policy, env_id, weights = load_run(args.run_dir)
    mode = "human" if args.render else "rgb_array" if args.video else None
    try:
        with closing(make_env(env_id, mode)) as env:
            policy = make_policy(env.observation_space, env.action_space)
            try:
                policy.load_state_dict(weights)
            except RuntimeError as error:
                refuse(f"{args.run_dir}: weights of another version of the script: {error}")
            torch.manual_seed(args.seed)
            returns = []
            for episode_return, length in play(env, policy, args):
                returns.append(episode_return)
                print(f"episode {len(returns)}: return {episode_return:g}, length {length}", flush=True)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        refuse(f"{error}. Try: pip install -r requirements-extras.txt")
    except gym.error.Error as error:
        refuse(f"{env_id}: {error}")
    except Exception as error:
        if mode is None:
            raise
        refuse(f"{env_id} cannot be drawn: {type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"mean {np.mean(returns):g} +- {np.std(returns):g} over {len(returns)} episodes")


if __name__ == "__main__":
    main(tyro.cli(Args))
