"""Train scripts x environments x seeds; every run is a line of matrix.jsonl or ablations.jsonl in results/.

    python benchmarks/run.py --scripts ppo trpo --env-ids CartPole-v1 --seeds 1 2 3 --jobs 2
    python benchmarks/run.py --scripts ppo --seeds 101 102 --variant lr-3e-3 --flags="--learning-rate 3e-3"

What is stored with the same flags and budget is skipped: the same call goes on after a Ctrl-C. A failed run
is stored with its error, and tried again next time. To train a stored run again, delete its line.
"""

import csv
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from importlib.metadata import distributions
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from pydantic import NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = "reinforce reinforce_baseline offpolicy_is vpg_gae a3c_nstep npg trpo ppo".split()
CURVE = ("step", "episodic_return", "seconds")  # columns kept of progress.csv, for the matrix alone
CURVE_POINTS = 100


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(SCRIPTS)  # files without .py: ppo, variants/ppo_kl_penalty
    env_ids: tuple[str, ...] = ()  # environments of commands.ini; none are all
    seeds: tuple[NonNegativeInt, ...] = (1, 2, 3)  # 1 to 10 are for reporting, those from 101 on for tuning
    jobs: PositiveInt = 1  # processes at a time, of one thread each; a3c_nstep.py has workers of its own
    variant: str = ""  # name of an ablation, whose runs are stored in ablations.jsonl
    flags: str = ""  # what the variant adds to the flags of commands.ini
    dry_run: bool = False  # only list what would run
    commands: Path = ROOT / "benchmarks" / "commands.ini"  # budgets and flags
    results: Path = ROOT / "benchmarks" / "results"  # folder of the stored runs


def read_commands(path):
    """{environment: {"total_timesteps": ..., "threshold": ..., script: flags}}, groups filled in."""
    table = ConfigParser(interpolation=None)
    table.read_string(path.read_text())
    groups = {section["like"] for section in table.values() if "like" in section}
    names = [name for name in table.sections() if name not in groups]
    return {name: {**table[table[name].get("like", name)], **table[name]} for name in names}


# ---------------------------------------------------------------------------- the file of runs


def key(run):
    """A run takes the place of an earlier one with the same key; also the order of the file."""
    return run["env_id"], run["script"], run.get("variant", ""), run["seed"]


def read_runs(path):
    """{key: run}: of the same key the last line counts, and a line that a killed process has torn is none."""
    runs = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            run = json.loads(line)
        except json.JSONDecodeError:
            continue
        runs[key(run)] = run
    return runs


def append(path, run):
    """Add a run as a whole line, by one write; a torn line before it is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with open(path, "ab", buffering=0) as file:
        file.write(("\n" * torn + json.dumps(run, separators=(",", ":")) + "\n").encode())


def tidy(path):
    """Sort the file and drop what was replaced; the new file takes the place of the old one as a whole."""
    size, runs, temporary = path.stat().st_size, read_runs(path), path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    for name in sorted(runs):
        append(temporary, runs[name])
    if path.stat().st_size == size:  # nobody else has appended to it meanwhile
        temporary.replace(path)


# ---------------------------------------------------------------------------- a run


def git(*command):
    return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine():
    info = open("/proc/cpuinfo") if sys.platform == "linux" else []
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def versions(*packages):
    found = [f"{x.name} {x.version}" for x in distributions() if x.name in packages]
    return ", ".join([f"python {platform.python_version()}", *sorted(found)])


class Job:
    """A training run: its command, and once it is started its process and folder."""

    def __init__(self, script, env_id, seed, table, args):
        flags = f"{table.get(script, '')} {args.flags}".split()
        budget = ["--total-timesteps", table["total_timesteps"]]
        self.command = [f"{script}.py", "--env-id", env_id, "--seed", str(seed), *budget, *flags]
        # a wrong flag ends the whole call here, before anything is trained
        cls = importlib.import_module(script.replace("/", ".")).Args
        budget = tyro.cli(cls, args=self.command[1:], prog=self.command[0]).total_timesteps
        self.run = {"variant": args.variant} if args.variant else {}
        self.run |= {"script": script, "env_id": env_id, "seed": seed}
        self.run |= {"total_timesteps": budget, "flags": " ".join(flags), "error": ""}

    def start(self):
        self.folder = TemporaryDirectory(ignore_cleanup_errors=True)
        dirty = "-dirty" if git("status", "--porcelain", "--", self.command[0]) else ""
        self.run["commit"] = git("rev-parse", "--short=10", "HEAD") + dirty
        self.process = subprocess.Popen(
            [sys.executable, ROOT / self.command[0], *self.command[1:], "--runs-dir", self.folder.name],
            cwd=self.folder.name,  # MuJoCo leaves a log where it is started
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=open(Path(self.folder.name, "stderr"), "w"),
            start_new_session=True,  # a group that can be ended with all that it has started
        )

    def result(self):
        """The run as it is stored, of a process that has ended."""
        files = list(Path(self.folder.name).glob("*/progress.csv"))
        rows = list(csv.DictReader(files[0].open())) if files else []
        step = int(rows[-1]["step"]) if rows else 0
        rows = [row for row in rows if row["episodic_return"] not in ("", "nan")]  # an episode has ended
        error = "" if rows and step >= self.run["total_timesteps"] else f"ended at step {step}"
        if self.process.returncode:
            last_line = Path(self.folder.name, "stderr").read_text().strip().rpartition("\n")[2]
            error = f"exit code {self.process.returncode}: {last_line}"
        last = rows[-1] if rows else {"episodes": 0, "seconds": 0}
        run = {**self.run, "error": error}
        run["final_return"] = None if error else round(float(last["episodic_return"]), 3)
        run |= {"episodes": int(last["episodes"]), "seconds": round(float(last["seconds"]), 1)}
        run |= {"machine": machine(), "versions": versions("torch", "numpy", "gymnasium", "mujoco")}
        if "variant" not in run:
            count = min(len(rows), CURVE_POINTS)
            rows = [rows[(i + 1) * len(rows) // count - 1] for i in range(count)]
            run["curve"] = {name: [float(f"{float(row[name]):.4g}") for row in rows] for name in CURVE}
        return run


def main(args):
    table = read_commands(args.commands)
    if args.flags and not args.variant:
        raise ValueError("--flags need the name of a --variant: the runs of the table have the table's flags")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: no process is left behind
    sys.path.insert(0, str(ROOT))
    path = args.results / ("ablations.jsonl" if args.variant else "matrix.jsonl")
    # seeds outside: whatever is cut off, what is there has as many seeds for every script
    matrix = [(seed, env_id) for seed in args.seeds for env_id in args.env_ids or table]
    jobs = [Job(x, env_id, seed, table[env_id], args) for seed, env_id in matrix for x in args.scripts]
    stored = read_runs(path)
    todo = [job for job in jobs if not job.run.items() <= stored.get(key(job.run), {}).items()]
    print(f"{len(todo)} of {len(jobs)} runs to do", file=sys.stderr)
    if args.dry_run:
        return print(*(f"python {' '.join(job.command)}" for job in todo), sep="\n")

    waiting, running, failed = todo[::-1], [], 0
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                job = waiting.pop()
                job.start()
                running.append(job)
            time.sleep(0.2)
            for job in [job for job in running if job.process.poll() is not None]:
                append(path, run := job.result())
                running.remove(job)
                job.folder.cleanup()
                failed += bool(run["error"])
                outcome = f"{run['final_return']} {run['error']} in {run['seconds']} s"
                left = len(waiting) + len(running)
                print(f"{' '.join(job.command)}: {outcome}; {left} runs left", file=sys.stderr)
    finally:
        for job in running:
            if job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)
    if todo:
        tidy(path)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(tyro.cli(Args))
