"""The pictures of the README, docs/NAME-light.svg and NAME-dark.svg, drawn from the CSV files in
benchmarks/data alone.

  pip install -r benchmarks/requirements.txt
  python benchmarks/figures.py                    all of them
  python benchmarks/figures.py ope online         some
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

import altair as alt
import numpy as np

ROOT = Path(__file__).parent.parent
COLOURS = {  # of a method in all pictures; after Okabe and Ito, for the colour-blind too
    "BC": "#E69F00",
    "%BC": "#CC79A7",
    "naive Q-learning": "#D55E00",
    "CQL": "#0072B2",
    "IQL": "#009E73",
    "AWAC": "#56B4E9",
    "BCQ": "#888888",
    "MOPO": "#B5A000",
}
NAMES = {  # of the methods in returns.py
    "bc": "BC",
    "%bc": "%BC",
    "naive": "naive Q-learning",
    "cql": "CQL",
    "iql": "IQL",
    "awac": "AWAC",
    "bcq": "BCQ",
    "mopo": "MOPO",
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
    names, colours = (
        ["online", "offline", "offline, then online"],
        ["#E69F00", "#009E73", "#56B4E9"],
    )
    colour = alt.Color("learner:N", title=None, scale=alt.Scale(domain=names, range=colours))
    dashes = alt.Scale(domain=names, range=[[1, 0], [1, 0], [5, 3]])
    x = alt.X("step:Q", title="gradient updates", axis=alt.Axis(values=[0, 4000, 8000]))
    scale = alt.Scale(domain=[0, 500])
    chart = curves(None, x, "return_mean", "return", colour, scale)
    chart = chart.encode(alt.StrokeDash("learner:N", title=None, scale=dashes))
    chart = chart.properties(width=165, height=170)
    column = alt.Column("dataset:N", title=None, sort=[f"cartpole/{name}" for name in order])
    return chart.properties(data=alt.Data(values=every)).facet(column=column)


def stitching(ink):
    """The data's paths, then one of each method; cells of one path are joined."""
    rows = read("stitching")
    end = {}  # of each method's path
    for row in rows:
        end[row["who"]] = row["x"], row["y"]
    data = [row for row in rows if row["who"].startswith("data")]
    rng = np.random.default_rng(0)
    shift = rng.uniform(-0.3, 0.3, (99, 2))  # so that paths of the data lie side by side
    for row in data:
        dx, dy = shift[int(row["path"]) + 20 * ("goal" in row["who"])]
        row["x"], row["y"] = row["x"] + dx, row["y"] + dy
    axis = {"axis": None, "scale": alt.Scale(domain=[-0.6, 6.6], nice=False)}
    x, y = alt.X("x:Q", **axis), alt.Y("y:Q", **{**axis, "scale": alt.Scale(domain=[-0.6, 4.6])})
    walls = [{"x": 2.5, "x2": 3.5, "y": a, "y2": b} for a, b in ((-0.5, 1.5), (2.5, 4.5))]
    walls = alt.Chart(alt.Data(values=walls)).mark_rect(color=ink, opacity=0.25)
    marks = [{"x": 0, "y": 0, "is": "start"}, {"x": 6, "y": 0, "is": "goal"}]
    names = alt.Chart(alt.Data(values=marks)).encode(x, y)
    background = (
        walls.encode(x, y, alt.X2("x2"), alt.Y2("y2"))
        + names.mark_text(color=ink, dy=14, fontSize=11).encode(text="is:N")
        + names.mark_square(color=ink, size=60)
    )

    def panel(title, rows, colour, **mark):
        lines = alt.Chart(alt.Data(values=rows)).mark_line(**mark)
        lines = lines.encode(x, y, alt.Detail("line:N"), alt.Order("step:Q"), color=colour)
        return (background + lines).properties(title=title, width=125, height=100)

    for row in rows:
        row["line"] = f"{row['who']} {row['path']}"
    two = alt.Scale(range=["#888888", ink])
    panels = [panel("the data", data, alt.Color("who:N", legend=None, scale=two), opacity=0.35)]
    for method, (x_end, y_end) in end.items():
        if method in COLOURS:
            earned = f"{method}: return {int((x_end, y_end) == (6, 0))}"
            its = [row for row in rows if row["who"] == method]
            mark = {"strokeWidth": 3, "point": {"size": 30, "color": COLOURS[method]}}
            panels.append(panel(earned, its, alt.value(COLOURS[method]), **mark))
    return alt.hconcat(*panels, spacing=12)


def ope(ink, n=100):
    """How far the estimates from one log of n episodes are from the truth, for five policies; and
    beside it, how often intervals held it in many such logs. Hollow: marked as no 95% interval."""
    rows = [row for row in read("ope") if row["n"] == n]
    for row in rows:
        row["title"] = f"{row['policy']}, {row['distance']:.0%} away"
        row |= {end: row[end] - row["truth"] for end in ("estimate", "low", "high")}
    titles = [title for _, title in sorted({(row["distance"], row["title"]) for row in rows})]
    names, blue = list(dict.fromkeys(row["estimator"] for row in rows)), COLOURS["CQL"]
    y = alt.Y("estimator:N", title=None, sort=names)
    scale = alt.Scale(domain=[-8, 8])
    printed = alt.Scale(domain=["True", "False"], range=[blue, "transparent"])
    fill = alt.Fill("printed_as_95:N", scale=printed, legend=None)
    points = {"stroke": blue, "filled": True, "size": 40, "opacity": 1, "clip": True}
    zero = {"color": COLOURS["naive Q-learning"], "strokeDash": [4, 3]}
    low = alt.X("low:Q", title="minus the truth", scale=scale)
    panel = (
        alt.Chart().mark_rule(**zero).encode(x=alt.datum(0))
        + alt.Chart().mark_rule(color=blue, clip=True).encode(low, alt.X2("high:Q"), y)
        + alt.Chart().mark_point(**points).encode(alt.X("estimate:Q", scale=scale), y, fill)
    ).properties(width=88, height=170)
    header = alt.Header(labelExpr="split(datum.value, ', ')")  # two lines
    column = alt.Column("title:N", title=None, sort=titles, header=header)
    errors = panel.properties(data=alt.Data(values=rows)).facet(column=column, spacing=6)
    held = [row for row in read("coverage") if row["setting"] == f"ratios-{n}"]
    for row in held:
        name, *unmarked = row["name"].split(", ")
        row |= {"estimator": name, "printed_as_95": str(not unmarked)}
        row["share"] = row["held"] / row["printed"]
    scale = alt.Scale(domain=[0.85, 1])
    title = f"of {max(row['logs'] for row in held):g} logs"
    share = alt.X("share:Q", title=title, scale=scale, axis=alt.Axis(format="%", tickCount=3))
    base = alt.Chart(alt.Data(values=held), width=135, height=100)
    coverage = base.mark_rule(**zero).encode(x=alt.datum(0.95, scale=scale))
    coverage += base.mark_point(**points).encode(share, y, fill)
    return errors | coverage.properties(title="truth in the interval")


def quality(ink):
    """Return after the last update against the controller's noise, and what the data earn."""
    rows = read("quality")
    last = max(row["update"] for row in rows)
    rows = [row for row in rows if row["update"] == last]
    axis = alt.Axis(format=".0%", tickCount=11)
    x = alt.X("noise:Q", title="share of the data's actions that are random", axis=axis)
    scale = alt.Scale(domain=[0, 500])
    chart = curves(rows, x, "return_mean", "return after 1,000 updates", of_method(rows), scale)
    data = alt.Chart(alt.Data(values=rows)).mark_line(color=ink, strokeDash=[5, 4], strokeWidth=2)
    chart += data.encode(x, alt.Y("mean(data_return_mean):Q", scale=scale))
    return chart.properties(width=640, height=260)


def shift(ink):
    """Q over all actions in four states, after training: ticks are the data's actions nearby, dots
    the policy's. Rewards are negative: no return is above the dashed line at 0."""
    rows, nearby = read("shift"), read("nearby")
    last = max(row["update"] for row in rows)
    rows = [row for row in rows if row["update"] == last]
    colour, x = of_method(rows), alt.X("action:Q", title="torque, N m")
    states, panels = list(dict.fromkeys(row["state"] for row in rows)), []
    for state in states:
        its = [row for row in rows if row["state"] == state]
        rug = [row for row in nearby if row["state"] == state and "mixed" not in row["data"]]
        at = [row for row in its if abs(row["action"] - row["policy_action"]) <= 0.05]
        axis = alt.Axis(labels=state == states[0], ticks=state == states[0])
        title, scale = "Q" if state == states[0] else None, alt.Scale(domain=[-700, 300])
        y = alt.Y("q:Q", title=title, scale=scale, axis=axis)
        base = alt.Chart(alt.Data(values=its), title=state, width=170, height=190)
        ticks = alt.Chart(alt.Data(values=rug)).mark_tick(color=ink, size=12, opacity=0.6)
        dots = alt.Chart(alt.Data(values=at)).mark_point(filled=True, size=90, opacity=1)
        chart = base.mark_line(strokeWidth=2.5).encode(x, y, colour) + dots.encode(x, y, colour)
        rule = base.mark_rule(color=ink, strokeDash=[5, 4]).encode(y=alt.datum(0))
        panels.append(rule + chart + ticks.encode(x, y=alt.value(183)))
    return alt.hconcat(*panels, spacing=10)


def conservatism(ink):
    """What CQL believes and what it earns, against alpha, on narrow and on broad data."""
    rows = {(row["data"], row["alpha"]): row for row in read("conservatism")}  # one of each cell
    names = {"q_policy": "Q of the policy", "true_value": "its true value", "return_mean": "return"}
    kinds = {"pendulum/0.05-v0": "narrow", "pendulum/mixed-v0": "broad"}
    points = [
        {"data": kinds[data], "alpha": alpha, "what": name, "value": row[field]}
        for (data, alpha), row in rows.items()
        for field, name in names.items()
    ]
    ranges = {"range": [COLOURS["naive Q-learning"], ink, COLOURS["CQL"]]}
    colour = alt.Color("what:N", title=None, scale=alt.Scale(domain=list(names.values()), **ranges))
    base = alt.Chart(alt.Data(values=points), width=320, height=220)
    lines = base.mark_line(strokeWidth=2.5, point=True).encode(
        alt.X("alpha:O", title="alpha", axis=alt.Axis(labelAngle=0)), alt.Y("value:Q"), colour
    )
    title = alt.Header(labelExpr="datum.value + ' data'")
    return lines.facet(
        column=alt.Column("data:N", title=None, sort=["narrow", "broad"], header=title)
    )


def learning(ink):
    """A panel for each dataset; runs of different length are drawn as long as they are."""
    rows = [row for row in read("learning") if row["method"] in NAMES]
    rows = [{**row, "method": NAMES[row["method"]]} for row in rows]
    x = alt.X("update:Q", title="updates", axis=alt.Axis(values=[0, 2000, 4000]))
    scale, order = alt.Scale(zero=False), ["random", "medium", "mixed", "expert"]
    chart = curves(None, x, "return_mean", "return", of_method(rows), scale)
    chart = chart.properties(width=160, height=140)

    def row_of(env):
        its = [
            {**row, "data": row["dataset"].removesuffix("-v0")}
            for row in rows
            if row["dataset"].startswith(env) and row["update"] <= 5000
        ]
        column = alt.Column("data:N", title=None, sort=[f"{env}/{name}" for name in order])
        return chart.properties(data=alt.Data(values=its)).facet(column=column, spacing=14)

    return row_of("pendulum") & row_of("cartpole")


def results(ink):
    """Final returns of benchmarks/returns.csv: means over the seeds and their 95% intervals."""
    from returns import interval

    cells = defaultdict(list)
    with open(ROOT / "benchmarks/returns.csv") as file:
        for row in csv.DictReader(file):
            if row["method"] in NAMES:
                key = NAMES[row["method"]], row["dataset"].removesuffix("-v0")
                cells[key].append((float(row["return_mean"]), float(row["data_return_mean"])))
    rows = []
    for (method, data), values in cells.items():
        returns, earned = np.array(values).T
        low, high = map(float, interval(returns))
        ends = {"low": low, "high": high, "mean": returns.mean(), "earned": earned[0]}
        rows.append({"method": method, "data": data, **ends})
    colour = of_method(rows).legend(None)
    y = alt.Y("method:N", title=None, sort=list(COLOURS))
    base, x = alt.Chart(), alt.X("mean:Q", title="return", scale=alt.Scale(zero=False))
    chart = (
        base.mark_rule(color=ink, strokeDash=[4, 3]).encode(alt.X("mean(earned):Q"))
        + base.mark_rule(strokeWidth=2.5).encode(alt.X("low:Q"), alt.X2("high:Q"), y, colour)
        + base.mark_point(filled=True, size=60, opacity=1).encode(x, y, colour)
    ).properties(width=155, height=130)

    def row_of(env):
        its = [row for row in rows if row["data"].startswith(env)]
        order = [f"{env}/{name}" for name in ("random", "medium", "mixed", "expert")]
        column = alt.Column("data:N", title=None, sort=order)
        return chart.properties(data=alt.Data(values=its)).facet(column=column, spacing=14)

    return row_of("pendulum") & row_of("cartpole")


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


FIGURES = [
    "extrapolation",
    "quality",
    "shift",
    "conservatism",
    "stitching",
    "ope",
    "online",
    "learning",
    "results",
]

if __name__ == "__main__":
    (ROOT / "docs").mkdir(exist_ok=True)
    for figure in sys.argv[1:] or FIGURES:
        for theme in INK:
            save(figure, theme)
