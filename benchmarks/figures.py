"""The first picture of the README: what the critic believes and what the policy earns, over
training, of naive Q-learning, CQL and IQL on narrow data (cartpole/expert, no action noise).

  python benchmarks/figures.py            runs what benchmarks/curves.csv lacks, then draws docs/
"""

import contextlib
import csv
import importlib
import io
import os
import sys
from pathlib import Path

import altair as alt

ROOT = Path(__file__).parent.parent
CSV = ROOT / "benchmarks/curves.csv"
COLUMNS = ["method", "seed", "update", "return_mean", "q_policy"]
METHODS = {  # name: file, flags, colour (colour-blind safe, Okabe and Ito)
    "naive Q-learning": ("cql", {"alpha": 0.0}, "#D55E00"),
    "CQL": ("cql", {}, "#0072B2"),
    "IQL": ("iql", {"steps": 4_000, "reward_scale": 1.0}, "#009E73"),
}
SEEDS = (100, 101, 102)
HIGHEST = 100.0  # reward 1, discount 0.99: no return is larger


def run(method, seed):
    """Rows of one training run, evaluated every 100 updates over 10 episodes."""
    name, flags, _ = METHODS[method]
    module = importlib.import_module(name)
    often = {"log_every": 100, "eval_every": 100, "eval_episodes": 100}
    flags = {"dataset_id": ("cartpole/expert-v0",), "seed": seed, **often, **flags}
    folder = f"runs/figures/{name}-{seed}-{flags.get('alpha', 1)}"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module.main(module.Args(out_dir=folder, **flags))
    metrics = max(Path(folder).glob("*/metrics.csv"), key=os.path.getmtime)
    with open(metrics) as file:
        for row in csv.DictReader(file):
            yield [method, seed, row["step"], row["return_mean"], row["q_policy"]]


def main():
    sys.path.insert(0, str(ROOT))
    rows = list(csv.reader(open(CSV)))[1:] if CSV.exists() else []
    done = {(row[0], int(row[1])) for row in rows}
    for method, seed in ((m, s) for s in SEEDS for m in METHODS if (m, s) not in done):
        print(f"{method}, seed {seed}", flush=True)
        rows += [list(map(str, row)) for row in run(method, seed)]
        with open(CSV, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
    (ROOT / "docs").mkdir(exist_ok=True)
    for theme, ink in (("light", "#222222"), ("dark", "#dddddd")):
        draw(rows, ink).save(ROOT / f"docs/extrapolation-{theme}.svg")


def draw(rows, ink):
    """Lines are means over the seeds, bands their whole range."""
    data = alt.Data(values=[dict(zip(COLUMNS, row, strict=True)) for row in rows])
    order, colours = list(METHODS), [colour for *_, colour in METHODS.values()]
    x = alt.X("update:Q", title="gradient updates")
    colour = alt.Color("method:N", title=None, scale=alt.Scale(domain=order, range=colours))

    def panel(field, title, scale):
        base = alt.Chart(data, width=340, height=230)
        y = alt.Y(f"mean({field}):Q", title=title, scale=scale)
        band = alt.Y(f"min({field}):Q", title=title, scale=scale), alt.Y2(f"max({field}):Q")
        area = base.mark_area(opacity=0.2).encode(x, *band, colour)
        return area + base.mark_line(strokeWidth=2.5).encode(x, y, colour)

    rule = alt.Chart(alt.Data(values=[{"y": HIGHEST}])).mark_rule(strokeDash=[5, 4], color=ink)
    rule = rule.encode(alt.Y("y:Q"))
    label = "Q(s, pi(s)), dashed: the largest possible return"
    believed = panel("q_policy", label, alt.Scale(type="symlog", constant=10)) + rule
    earned = panel("return_mean", "true return of the policy", alt.Scale(domain=[0, 500]))
    chart = (believed | earned).configure(background="transparent", font="sans-serif")
    chart = chart.configure_axis(
        labelColor=ink, titleColor=ink, domainColor=ink, tickColor=ink, gridOpacity=0.15
    )
    legend = {"orient": "top", "labelColor": ink, "labelFontSize": 13, "symbolOpacity": 1}
    return chart.configure_legend(**legend).configure_view(stroke=None)


if __name__ == "__main__":
    main()
