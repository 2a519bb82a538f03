"""The pictures of the README, docs/NAME-light.svg and NAME-dark.svg, drawn from the CSV files in
benchmarks/data alone.

  pip install -r benchmarks/requirements.txt
  python benchmarks/figures.py                    all of them
  python benchmarks/figures.py ope online         some
"""

import csv
import sys
from pathlib import Path

import altair as alt

ROOT = Path(__file__).parent.parent
COLOURS = {  # of a method in all pictures; after Okabe and Ito, who can be told apart by everybody
    "BC": "#888888",
    "%BC": "#56B4E9",
    "naive Q-learning": "#D55E00",
    "CQL": "#0072B2",
    "IQL": "#009E73",
    "AWAC": "#E69F00",
    "BCQ": "#CC79A7",
    "MOPO": "#B5A000",
}
LINE = {"symbolType": "stroke", "symbolStrokeWidth": 3, "symbolSize": 400}  # in legends
INK = {"light": "#222222", "dark": "#dddddd"}


def extrapolation(ink):
    """What naive Q-learning, CQL and IQL believe, and what they earn."""
    data, x = read("curves"), alt.X("update:Q", title="gradient updates")
    colour = of_method(data)
    rule = alt.Chart(alt.Data(values=[{"y": 100}])).mark_rule(strokeDash=[5, 4], color=ink)
    rule = rule.encode(alt.Y("y:Q"))  # reward 1, discount 0.99: no return is larger
    label = "Q(s, pi(s)), dashed: the largest possible return"
    log = alt.Scale(type="symlog", constant=10)
    believed = curves(data, x, "q_policy", label, colour, log) + rule
    scale = alt.Scale(domain=[0, 500])
    earned = curves(data, x, "return_mean", "true return of the policy", colour, scale)
    size = {"width": 340, "height": 230}
    return believed.properties(**size) | earned.properties(**size)


def online(ink):
    """A panel for each dataset, the same online learner in all of them."""
    order, rows = ["random", "medium", "mixed", "expert"], read("online")
    every = [
        {**row, "dataset": f"cartpole/{dataset}"}
        for row in rows
        for dataset in order
        if row["dataset"] in ("none", dataset)
    ]
    names, colours = ["online", "offline", "offline, then online"], [ink, *2 * [COLOURS["IQL"]]]
    colour = alt.Color("learner:N", title=None, scale=alt.Scale(domain=names, range=colours))
    dashes = alt.Scale(domain=names, range=[[1, 0], [1, 0], [5, 3]])
    x = alt.X("step:Q", title="gradient updates", axis=alt.Axis(values=[0, 4000, 8000]))
    scale = alt.Scale(domain=[0, 500])
    chart = curves(None, x, "return_mean", "return", colour, scale)
    chart = chart.encode(alt.StrokeDash("learner:N", title=None, scale=dashes))
    chart = chart.properties(width=165, height=170)
    column = alt.Column("dataset:N", title=None, sort=[f"cartpole/{name}" for name in order])
    return chart.properties(data=alt.Data(values=every)).facet(column=column)


def curves(data, x, field, title, colour, scale):
    """Lines are means over the seeds, bands their whole range."""
    base = alt.Chart(alt.Data(values=data) if data else alt.Undefined)
    y = alt.Y(f"mean({field}):Q", title=title, scale=scale)
    band = alt.Y(f"min({field}):Q", title=title, scale=scale), alt.Y2(f"max({field}):Q")
    area = base.mark_area(opacity=0.2).encode(x, *band, colour)
    return area + base.mark_line(strokeWidth=2.5).encode(x, y, colour)


def of_method(rows):
    """The colour encoding of the methods that the rows have."""
    names = [name for name in COLOURS if name in {row["method"] for row in rows}]
    scale = alt.Scale(domain=names, range=[COLOURS[name] for name in names])
    return alt.Color("method:N", title=None, scale=scale)


def read(name):
    """Rows of benchmarks/data/NAME.csv, numbers as such."""

    def number(x):
        try:
            return float(x)
        except ValueError:
            return x

    with open(ROOT / f"benchmarks/data/{name}.csv") as file:
        return [{key: number(x) for key, x in row.items()} for row in csv.DictReader(file)]


def save(name, theme):
    ink = INK[theme]
    chart = globals()[name](ink).configure(background="transparent", font="sans-serif")
    chart = chart.configure_axis(
        labelColor=ink, titleColor=ink, domainColor=ink, tickColor=ink, gridOpacity=0.15
    )
    chart = chart.configure_legend(
        orient="top", labelColor=ink, titleColor=ink, labelFontSize=13, symbolOpacity=1, **LINE
    )
    chart = chart.configure_header(labelColor=ink, labelFontSize=12, titleColor=ink)
    chart = chart.configure_title(color=ink).configure_view(stroke=None)
    chart.save(ROOT / f"docs/{name}-{theme}.svg")


FIGURES = ["extrapolation", "online"]

if __name__ == "__main__":
    (ROOT / "docs").mkdir(exist_ok=True)
    for figure in sys.argv[1:] or FIGURES:
        for theme in INK:
            save(figure, theme)
