"""The figures and tables of the benchmark, from the runs that benchmarks/run.py has stored.

    python benchmarks/plot.py

Draws figures/*.svg, writes results/ablations.md, and replaces what stands between <!-- results --> and
<!-- /results --> in README.md and benchmarks/README.md.

The interquartile mean, its stratified bootstrap intervals and the performance profile are those of Agarwal et
al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical Precipice", arXiv:2108.13264.
"""

import csv
import re
import sys
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import tyro
from pydantic.dataclasses import dataclass

sys.path.insert(0, str(Path(__file__).resolve().parent))

from run import ROOT, SCRIPTS, read_commands, read_runs

HERE = Path(__file__).resolve().parent
# Okabe and Ito's colours, which the colour-blind can tell apart, with a grey for their yellow
COLORS = "#999999 #000000 #56B4E9 #009E73 #CC79A7 #E69F00 #D55E00 #0072B2".split()
DASHED = SCRIPTS[:3]  # the episode family
VARIANTS = sorted(f"variants/{path.stem}" for path in ROOT.glob("variants/*.py"))
STYLE = {"axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.grid": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "grid.color": "#E5E5E5", "svg.hashsalt": "0"}


@dataclass
class Args:
    results: Path = HERE / "results"  # folder of the stored runs
    figures: Path = HERE / "figures"  # folder of the figures
    readme: Path = HERE.parent / "README.md"  # gets the table of final returns
    details: Path = HERE / "README.md"  # gets the tables beside it


# ---------------------------------------------------------------------------- data


def load(path, table):
    """{(environment, script, variant): runs by seed} in the order of the table; says what is left out."""
    groups, scripts, env_ids = {}, SCRIPTS + VARIANTS, list(table)
    for run in read_runs(path).values():
        if run["error"] or run["env_id"] not in table or run["script"] not in scripts:
            why = run["error"] or "no such environment or script in the tables"
            print(f"left out: {run['script']} {run['env_id']} seed {run['seed']}: {why}", file=sys.stderr)
        else:
            groups.setdefault((run["env_id"], run["script"], run.get("variant", "")), []).append(run)
    order = sorted(groups, key=lambda key: (env_ids.index(key[0]), scripts.index(key[1]), key[2]))
    return {key: sorted(groups[key], key=lambda run: run["seed"]) for key in order}


def final_returns(group):
    return np.array([run["final_return"] for run in group])


def curves(group, points=50):
    """A grid of steps (points,) that all runs have, and the returns of every run there (runs, points)."""
    steps = [run["curve"]["step"] for run in group]
    grid = np.linspace(max(x[0] for x in steps), min(x[-1] for x in steps), points)
    returns = [np.interp(grid, x, run["curve"]["episodic_return"]) for x, run in zip(steps, group)]
    return grid, np.array(returns)


def steps_to(threshold, run):
    """The first stored step with a return that high, infinite if there is none."""
    points = zip(run["curve"]["step"], run["curve"]["episodic_return"])
    return next((step for step, value in points if value >= threshold), float("inf"))


def normalize(scores, env_id, published):
    """0 is the return of random actions, 1 the highest score in published.csv."""
    known = {algorithm: float(row["score"]) for (name, algorithm), row in published.items() if name == env_id}
    zero = known.pop("random")
    return (scores - zero) / (max(known.values()) - zero)


# ---------------------------------------------------------------------------- statistics


def iqm(scores):
    """The interquartile mean over runs, without the lowest and the highest quarter: (runs, ...) -> (...)"""
    cut = len(scores) // 4
    return np.sort(scores, axis=0)[cut : len(scores) - cut].mean(0)


def bootstrap(strata, statistic, repetitions=1000):
    """95% interval of statistic(strata), each of shape (runs, ...) having its runs drawn with replacement."""
    random = np.random.default_rng(0)
    draws = [[x[random.integers(len(x), size=len(x))] for x in strata] for _ in range(repetitions)]
    return np.percentile([statistic(draw) for draw in draws], [2.5, 97.5], axis=0)


def iqm_interval(scores):
    return bootstrap([scores], lambda strata: iqm(strata[0]))


def profile(strata, taus):
    """The share of runs with a score of tau or more, a mean over environments: (runs,) each -> (taus,)"""
    return np.mean([(scores[:, None] >= taus).mean(0) for scores in strata], axis=0)


# ---------------------------------------------------------------------------- tables


def markdown(head, rows):
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def matrix_table(groups, cell):
    """Scripts that have runs as columns and environments as rows of cell(env_id, script, runs)."""
    scripts = [script for script in SCRIPTS if script in {name for _, name, _ in groups}]
    rows = [[env_id] for env_id in dict.fromkeys(env_id for env_id, _, _ in groups)]
    for row in rows:
        of = {script: groups.get((row[0], script, "")) for script in scripts}
        row += [cell(row[0], script, group) if group else "" for script, group in of.items()]
    return markdown(["", *(f"`{script}`" for script in scripts)], rows)


def spread(scores, digits=0):
    deviation = f" ± {stdev(scores):.{digits}f}" if len(scores) > 1 else ""
    return f"{mean(scores):.{digits}f}{deviation} ({len(scores)})"


def final_table(groups):
    """The README's, short: without the numbers of seeds; a single one has no deviation."""

    def cell(env_id, script, group):
        scores = final_returns(group)
        digits = int(abs(mean(scores)) < 10)
        deviation = f"±{stdev(scores):.{digits}f}" if len(scores) > 1 else ""
        return f"{mean(scores):.{digits}f}{deviation}"

    return matrix_table(groups, cell)


def published_table(groups, published):
    def cell(env_id, script, group):
        scores = final_returns(group)
        ours, row = spread(scores, digits=int(abs(mean(scores)) < 1000)), published.get((env_id, script))
        if row and len(scores) > 1 and mean(scores) >= float(row["score"]):
            ours = f"**{ours}**"
        return f"{ours}; {row['score']}" if row else ours

    return matrix_table(groups, cell)


def steps_table(groups, table):
    def cell(env_id, script, group):
        steps = [steps_to(float(table[env_id]["threshold"]), run) for run in group]
        half = f"{median(steps) / 1000:.0f}k" if np.isfinite(median(steps)) else "-"
        return f"{half} ({np.isfinite(steps).sum()} of {len(steps)})"

    return matrix_table(groups, cell)


def ablation_table(groups):
    rows = []
    for (env_id, script, variant), group in groups.items():
        seeds = ", ".join(str(run["seed"]) for run in group)
        flags = " or ".join(dict.fromkeys(f"`{run['flags']}`" for run in group if run["flags"]))
        steps = f"{group[0]['total_timesteps']:,}"
        rows.append([env_id, script, variant, spread(final_returns(group), 1), seeds, steps, flags])
    return markdown("environment,script,variant,mean ± std (seeds),seeds,steps,flags".split(","), rows)


# ---------------------------------------------------------------------------- figures


def new_figure(titles):
    """A figure, and a panel for each title."""
    import matplotlib.pyplot as plt

    plt.rcParams |= STYLE
    columns = min(3, len(titles))
    rows = -(-len(titles) // columns)
    size = 1 + 3.7 * max(2, columns), 1 + 2.6 * rows
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(h_pad=0.1)
    for ax in axes.flat[len(titles) :]:
        ax.remove()
    for ax, title in zip(axes.flat, titles):
        ax.set_title(title)
    return figure, axes.flat


def draw(ax, x, y, band, script):
    style, color = "--" if script in DASHED else "-", COLORS[SCRIPTS.index(script)]
    ax.plot(x, y, style, color=color, label=f"{script}.py")
    ax.fill_between(x, *band, color=color, alpha=0.15, linewidth=0)


def save(figure, title, path):
    """One legend for all panels, and a white background, which a dark page shows as it is."""
    labels = {}
    for ax in figure.axes:
        labels |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels())}
    place = {"loc": "outside upper left", "ncols": 4, "frameon": False, "alignment": "left"}
    figure.legend(labels.values(), labels, title=title, **place)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def plot_learning_curves(groups, path):
    env_ids = list(dict.fromkeys(env_id for env_id, _, _ in groups))
    figure, axes = new_figure(env_ids)
    for (env_id, script, _), group in groups.items():
        steps, returns = curves(group)
        draw(axes[env_ids.index(env_id)], steps / 1000, iqm(returns), iqm_interval(returns), script)
    for ax in figure.axes:
        ax.set(xlabel="environment steps / 1000", ylabel="return")
    save(figure, "Mean of the last 100 training episodes: interquartile mean over seeds, 95% interval", path)


def plot_profile(groups, published, path):
    """Only over environments that all of these scripts were run on: they shall have stood the same test."""
    scripts = dict.fromkeys(script for _, script, _ in groups)
    every = dict.fromkeys(env_id for env_id, _, _ in groups)
    env_ids = [env_id for env_id in every if all((env_id, script, "") in groups for script in scripts)]
    figure, (ax, *_) = new_figure([f"Performance profile over {len(env_ids)} environments"])
    taus = np.linspace(0, 1.2, 121)
    for script in scripts if env_ids else ():
        strata = [normalize(final_returns(groups[e, script, ""]), e, published) for e in env_ids]
        draw(ax, taus, profile(strata, taus), bootstrap(strata, lambda draw: profile(draw, taus)), script)
    ax.set(xlabel="τ: 0 is random actions, 1 the highest published score", ylabel="share of runs ≥ τ")
    save(figure, "", path)


# ---------------------------------------------------------------------------- files


def replace_section(path, text):
    """Put text between <!-- results --> and <!-- /results -->, if the file has them."""
    if path.exists():
        section = f"<!-- results -->\n{text}<!-- /results -->"
        old = path.read_text()
        path.write_text(re.sub("<!-- results -->.*<!-- /results -->", lambda _: section, old, flags=re.S))


def main(args):
    table = read_commands(HERE / "commands.ini")
    with open(HERE / "published.csv") as file:
        published = {(row["environment"], row["algorithm"]): row for row in csv.DictReader(file)}
    groups = load(args.results / "matrix.jsonl", table)
    if not groups:
        raise ValueError(f"there are no runs in {args.results}/matrix.jsonl: python benchmarks/run.py")
    ablations = load(args.results / "ablations.jsonl", table | read_commands(HERE / "variants.ini"))
    plot_learning_curves(groups, args.figures / "learning_curves.svg")
    plot_profile(groups, published, args.figures / "profile.svg")
    replace_section(args.readme, final_table(groups))
    replace_section(args.details, f"{published_table(groups, published)}\n{steps_table(groups, table)}")
    text = "Made by plot.py from ablations.jsonl. What has no flag is the default at the commit of the run."
    (args.results / "ablations.md").write_text(f"{text}\n\n{ablation_table(ablations)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
