"""Learning curves of run folders, from their metrics.csv.

python benchmarks/plot.py runs/*                               in the terminal, every metric
python benchmarks/plot.py runs/cql__* --metric return_mean --out curves.html     or .png, .svg
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

BARS = " ▁▂▃▄▅▆▇█"


@dataclass
class Args:
    runs: Positional[tuple[str, ...]]  # folders of runs
    metric: tuple[str, ...] = ()  # columns of metrics.csv; default: all
    out: str | None = None  # .html, .png or .svg instead of the terminal (needs altair)


def main(args: Args):
    curves = [(Path(run).name, name, points) for run in args.runs for name, points in read(run)]
    curves = [curve for curve in curves if not args.metric or curve[1] in args.metric]
    if not curves:
        raise SystemExit("plot: no such run or metric")
    if args.out:
        return draw(curves, args.out)
    for run in dict.fromkeys(run for run, *_ in curves):
        print(run)
        for _, name, points in (curve for curve in curves if curve[0] == run):
            values = [value for _, value in points]
            print(f"  {name:16} {sparkline(values)}  {values[0]:.4g} to {values[-1]:.4g}")


def read(run):
    """(metric, [(step, value), ...]) pairs of a run's folder; rows without a value are left out."""
    path = Path(run, "metrics.csv")
    if not path.exists():
        raise SystemExit(f"plot: {run}: not the folder of a run, it has no metrics.csv")
    with open(path) as file:
        rows = list(csv.DictReader(file))
    for name in (name for name in (rows[0] if rows else ()) if name != "step"):
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        if points:
            yield name, points


def sparkline(values, width=40):
    low, high = min(values), max(values)
    chosen = [values[i * len(values) // width] for i in range(width)]
    chosen = values if len(values) <= width else chosen
    return "".join(BARS[round((x - low) / ((high - low) or 1) * (len(BARS) - 1))] for x in chosen)


def draw(curves, path):
    import altair as alt

    rows = [
        {"run": run, "metric": name, "update": step, "value": value}
        for run, name, points in curves
        for step, value in points
    ]
    x, y = alt.X("update:Q"), alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    legend = alt.Legend(orient="bottom", columns=1, labelLimit=0)
    base = alt.Chart(alt.Data(values=rows), width=280, height=160).mark_line()
    base = base.encode(x, y, alt.Color("run:N", title=None, legend=legend))
    chart = base.facet(alt.Facet("metric:N", title=None), columns=3).resolve_scale(y="independent")
    chart.save(path, **({"inline": True} if path.endswith(".html") else {}))  # without network


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
