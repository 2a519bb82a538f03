"""docs/index.html: five demonstrations that one can touch, from the CSVs in benchmarks/data/.

  python benchmarks/page.py               builds the page

One file without network: the charts are Altair's, the library that draws them stands in the page.
"""

import csv
import html
import json
import textwrap
from collections import defaultdict
from pathlib import Path

import altair as alt
import figures
import vl_convert

ROOT = Path(__file__).parent.parent
COLOURS = figures.COLOURS | {"DQN": "#E69F00", "IQL, then online": "#56B4E9"}
LEGEND = alt.Legend(**figures.LINE)
ALPHAS = [0, 0.1, 0.3, 1, 3, 10]
SEED = "100"  # of the curves of Q
NARROW, BROAD = "pendulum/0.05-v0", "pendulum/mixed-v0"
STATES = ["half-way up, rising", "hanging, at rest", "upright, falling", "upright, at rest"]
LIBRARY = "window.vegaEmbed = vegaEmbed;"
SECTION = """
<section id="demo{i}">
<h2>{i}. {heading}</h2>
<p>{sentence}</p>
<fieldset><legend>{ask}</legend><div class="controls"></div></fieldset>
<div class="chart"></div>
<p class="discovery">{discovery}</p>
<p><code>{command}</code></p>
</section>
"""


def read(name):
    """Rows of a CSV, with numbers where there are numbers."""
    with (ROOT / f"benchmarks/data/{name}.csv").open() as file:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def table(rows, *columns):
    """The distinct rows of these columns, as data of a chart."""
    distinct = dict.fromkeys(tuple(row[c] for c in columns) for row in rows)
    return alt.Data(values=[dict(zip(columns, row, strict=True)) for row in distinct])


def colour(methods):
    scale = alt.Scale(domain=methods, range=[COLOURS[m] for m in methods])
    return alt.Color("method:N", title=None, scale=scale, legend=LEGEND)


def means(rows, keys, value):
    """Mean, least and largest over the seeds."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[k] for k in keys)].append(row[value])
    return [
        dict(zip(keys, key, strict=True))
        | {value: round(sum(x) / len(x), 2), "low": min(x), "high": max(x)}
        for key, x in groups.items()
    ]


def slider(name, label, low, high, step, value):
    bind = alt.binding_range(min=low, max=high, step=step, name=label)
    return alt.param(name, bind=bind, value=value)


def choice(name, label, options, value, labels=None):
    bind = alt.binding_radio(options=options, labels=labels or options, name=label)
    return alt.param(name, bind=bind, value=value)


def title(expression):
    return alt.TitleParams(alt.ExprRef(expression))


def concat(*panels, params):
    """Side by side; the page puts them below each other on a phone. Each keeps its colours."""
    return alt.concat(*panels, columns=2).add_params(*params)


def online():
    rows = read("online")
    names = {"online": "DQN", "offline": "IQL", "offline, then online": "IQL, then online"}
    for row in rows:
        row["method"] = names[row["learner"]]
    order = ["random", "medium", "mixed", "expert"]
    labels = ["random actions", "a flawed controller", "a mixture", "an expert"]
    where = choice("dataset", "data: ", order, "random", labels)
    keys = ("method", "dataset", "step")
    data = alt.Data(values=means(rows, keys, "return_mean"))
    base = alt.Chart(data, height=260, title=title("'CartPole, data: cartpole/' + dataset + '-v0'"))
    base = base.transform_filter("datum.dataset == dataset || datum.dataset == 'none'")
    x = alt.X("step:Q", title="gradient updates")
    y = "return (steps that the pole stands)"
    scale = alt.Scale(domain=[0, 500])
    names = list(names.values())
    line = base.mark_line(strokeWidth=3, point=True)
    line = line.encode(x, alt.Y("return_mean:Q", title=y, scale=scale), colour(names))
    band = base.mark_area(opacity=0.2).encode(
        x, alt.Y("low:Q", title=y, scale=scale), alt.Y2("high:Q"), colour(names)
    )
    final = {
        (row["method"], row["dataset"]): row["return_mean"]
        for row in means(rows, keys, "return_mean")
        if row["step"] == 8000
    }
    seen = ", ".join(
        f"{final['IQL', d]:.0f} from {name}" for d, name in zip(order, labels, strict=True)
    )
    return (
        concat(band + line, params=[where]),
        "Online against offline",
        "An online learner (DQN) makes one step of its own per update. An offline one (IQL) only "
        "sees 20,000 logged steps, or goes on online after half of its updates. "
        "Bands: the range of three seeds.",
        f"The data decide: after 8,000 updates IQL earns {seen}; DQN, which needs no data, "
        f"{final['DQN', 'none']:.0f}. Nothing that the data lack can be learned from them.",
        "python benchmarks/online.py",
        "Choose who made the data",
    )


def shift():
    rows = [row for row in read("shift") if row["seed"] == float(SEED)]
    methods = ["naive Q-learning", "CQL"]
    near = [row for row in read("nearby") if row["data"] == NARROW]
    update = slider("step", "update ", 250, 2500, 250, 2500)
    state = choice("place", "state: ", STATES, STATES[0])
    who = choice("critic", "curve: ", ["both", *methods], methods[0])
    here = "datum.state == place"
    shown = f"{here} && datum.update == step && (critic == 'both' || datum.method == critic)"
    x = alt.X("action:Q", title="action (torque, N m)", scale=alt.Scale(domain=[-2, 2]))
    q_title = "Q(s, a) (discounted return)"
    curves = alt.Chart(
        table(rows, "method", "update", "state", "action", "q"),
        title=title("'Q after ' + step + ' updates; ' + place"),
        height=260,
    )
    curves = curves.transform_filter(shown)
    line = curves.mark_line(strokeWidth=3).encode(
        x, alt.Y("q:Q", title=q_title, scale=alt.Scale(zero=False)), colour(methods)
    )
    chosen = with_q_of_the_policy(rows, "method", "update")
    dot = alt.Chart(chosen).transform_filter(shown)
    dot = dot.mark_point(filled=True, size=140, opacity=1).encode(
        alt.X("policy_action:Q"), alt.Y("q:Q"), colour(methods)
    )
    summary = table(rows, "method", "update", "q_policy", "true_value")
    base = alt.Chart(
        summary, height=260, title="What is believed (solid) and what is earned (dashed)"
    )
    x = alt.X("update:Q", title="gradient updates", scale=alt.Scale(domain=[0, 2600]))
    y = "discounted return from the same 10 states"
    solid = base.mark_line(strokeWidth=3).encode(x, alt.Y("q_policy:Q", title=y), colour(methods))
    dashed = base.mark_line(strokeWidth=2, strokeDash=[6, 4]).encode(
        x, alt.Y("true_value:Q", title=y), colour(methods)
    )
    zero = alt.Chart(alt.Data(values=[{"y": 0}])).mark_rule().encode(alt.Y("y:Q"))
    now = base.transform_filter("datum.update == step")
    spot = now.mark_point(filled=True, size=90, opacity=1).encode(
        x, alt.Y("q_policy:Q"), colour(methods)
    )
    below = alt.ExprRef("datum.method == 'CQL' ? 14 : -8")
    label = now.mark_text(align="right", dx=-8, dy=below, fontWeight="bold").encode(
        x, alt.Y("q_policy:Q"), alt.Text("q_policy:Q", format=".0f"), colour(methods)
    )
    end = {m: [r for r in rows if r["method"] == m][-1] for m in methods}
    naive, cql = end.values()
    high = [r["q"] for r in rows if r["state"] == STATES[0] and r["method"] == methods[0]]
    high = high[-len({r["action"] for r in rows}) :]  # after the last update
    return (
        concat(
            line + dot + rug(near, here),
            solid + dashed + zero + spot + label,
            params=[update, state, who],
        ),
        "Distribution shift",
        "Naive Q-learning (an actor that maximises Q) on the narrow logs of an expert, 5% of whose "
        "actions are random. Ticks: the actions in the data near this state. Dots: the policy's "
        "action. No reward in Pendulum is above 0, so that no true Q is (line at 0).",
        f"After 2,500 updates naive Q-learning believes in {naive['q_policy']:.0f} and earns "
        f"{naive['true_value']:.0f}; CQL (alpha 3) believes in {cql['q_policy']:.0f} and earns "
        f"{cql['true_value']:.0f}. Half-way up the naive Q is {min(high):.0f} to {max(high):.0f}, "
        "at the data's actions too, and the policy takes the highest. One training seed.",
        "python benchmarks/demos.py",
        "Move through the training, choose a state",
    )


def with_q_of_the_policy(rows, *keys):
    """Where the policy's action is, with Q there, between two torques of the grid."""
    groups = defaultdict(list)
    for row in rows:
        groups[(*(row[k] for k in keys), row["state"], row["policy_action"])].append(row)
    values = []
    for (*key, state, action), grid in groups.items():
        left = max((r for r in grid if r["action"] <= action), key=lambda r: r["action"])
        right = min((r for r in grid if r["action"] >= action), key=lambda r: r["action"])
        width = right["action"] - left["action"]
        part = (action - left["action"]) / width if width else 0
        q = round((1 - part) * left["q"] + part * right["q"], 2)
        values.append(
            dict(zip(keys, key, strict=True)) | {"state": state, "policy_action": action, "q": q}
        )
    return alt.Data(values=values)


def rug(near, condition):
    ticks = alt.Chart(table(near, "data", "state", "action")).transform_filter(condition)
    ticks = ticks.mark_tick(thickness=2, height=14, opacity=0.6, orient="vertical")
    return ticks.encode(alt.X("action:Q"), y=alt.value(252))


def conservatism():
    rows, near = read("conservatism"), read("nearby")
    for row in rows:
        row["k"] = ALPHAS.index(row["alpha"])
        row["method"] = "CQL" if row["alpha"] else "naive Q-learning"
        row["label"] = f"{row['alpha']:g}"
    methods = ["naive Q-learning", "CQL"]
    alpha = slider("k", "alpha ", 0, 5, 1, 3)
    data = choice(
        "data", "data: ", [NARROW, BROAD], NARROW, ["narrow (an expert's)", "broad (a mixture)"]
    )
    state = choice("state", "state: ", STATES, STATES[0])
    naive = alt.param(
        "naive", bind=alt.binding_checkbox(name="naive Q-learning beside it "), value=True
    )
    value = f"{ALPHAS}[k]"
    here, shown = (
        "datum.state == state && datum.data == data",
        "(datum.k == k || (naive && datum.k == 0))",
    )
    x = alt.X("action:Q", title="action (torque, N m)", scale=alt.Scale(domain=[-2, 2]))
    q_title = "Q(s, a) (discounted return)"
    curves = alt.Chart(
        table(rows, "method", "k", "data", "state", "action", "q"),
        title=title(f"'alpha = ' + {value} + '; ' + state"),
        height=260,
    ).transform_filter(f"{here} && {shown}")
    line = curves.mark_line(strokeWidth=3).encode(
        x, alt.Y("q:Q", title=q_title, scale=alt.Scale(zero=False)), colour(methods)
    )
    dot = alt.Chart(with_q_of_the_policy(rows, "method", "k", "data")).transform_filter(
        f"{here} && {shown}"
    )
    dot = dot.mark_point(filled=True, size=140, opacity=1).encode(
        alt.X("policy_action:Q"), alt.Y("q:Q"), colour(methods)
    )

    def over_alpha(fields, name, heading):
        """Lines over alpha: the first solid, the second dashed, numbers where the slider is."""
        base = alt.Chart(
            table(rows, "method", "k", "label", "data", *fields), height=200, title=heading
        ).transform_filter("datum.data == data")
        x = alt.X(
            "label:O", title="alpha", sort=[f"{a:g}" for a in ALPHAS], axis=alt.Axis(labelAngle=0)
        )
        blue = alt.value(COLOURS["CQL"])
        hue = f"k ? '{COLOURS['CQL']}' : '{COLOURS['naive Q-learning']}'"
        layers = []
        for field, dash in zip(fields, ([1, 0], [6, 4]), strict=False):
            y = alt.Y(f"{field}:Q", title=name)
            layers.append(base.mark_line(strokeWidth=3, strokeDash=dash).encode(x, y, color=blue))
            now = base.transform_filter("datum.k == k")
            spot = now.mark_point(filled=True, size=90, opacity=1, color=alt.ExprRef(hue))
            layers.append(spot.encode(x, y))
            above = f"datum.{field} >= max({', '.join(f'datum.{f}' for f in fields)})"
            text = now.mark_text(dx=8, dy=alt.ExprRef(f"{above} ? -12 : 16"), fontWeight="bold")
            layers.append(text.encode(x, y, text=alt.Text(f"{field}:Q", format=".3~r")))
        return alt.layer(*layers)

    last = {(row["data"], row["alpha"]): row for row in rows}
    story = "; ".join(
        f"alpha {a} believes in {last[NARROW, a]['q_policy']:.0f} and earns "
        f"{last[NARROW, a]['true_value']:.0f}"
        for a in (0, 1, 10)
    )
    return (
        concat(
            line + dot + rug(near, here),
            over_alpha(
                ("q_policy", "true_value"),
                "discounted return",
                "Believed (solid) and earned (dashed)",
            ),
            over_alpha(("gap",), "gap (units of Q)", "How much higher Q is off the data"),
            over_alpha(("return_mean",), "return of an episode", "What the final policy earns"),
            params=[alpha, data, state, naive],
        ),
        "Conservatism",
        "CQL adds alpha times the gap to the critic's loss: Q goes down over all actions and up at "
        "those of the data.",
        f"On the narrow data {story}. On the broad data alpha 10 keeps Q "
        f"({last[BROAD, 10]['q_policy']:.0f}) below what is earned "
        f"({last[BROAD, 10]['true_value']:.0f}), and the return of an episode rises from "
        f"{last[BROAD, 0]['return_mean']:.0f} to {last[BROAD, 10]['return_mean']:.0f}. "
        "One training seed.",
        "python benchmarks/demos.py",
        "Move the weight of the penalty",
    )


def quality():
    rows = read("quality")
    methods = [m for m in COLOURS if m in {row["method"] for row in rows}]
    noise = slider("noise", "controller's noise ", 0, 1, 0.1, 0.5)
    names = ["all", *methods]
    method = choice("shown", "method: ", names, "all")
    behaviour = table(rows, "noise", "data_return_mean")
    steps = max(row["update"] for row in rows)
    curves = means(rows, ("method", "noise", "update"), "return_mean")
    y, scale = "return (steps that the pole stands)", alt.Scale(domain=[0, 500])
    here = "datum.noise == noise && (shown == 'all' || datum.method == shown)"
    base = alt.Chart(
        alt.Data(values=curves),
        height=260,
        title=title("'Learning curves, noise ' + noise + '; dashed: the data'"),
    ).transform_filter(here)
    x = alt.X("update:Q", title="gradient updates", scale=alt.Scale(domain=[0, steps]))
    line = base.mark_line(strokeWidth=3, point=True).encode(
        x, alt.Y("return_mean:Q", title=y, scale=scale), colour(methods)
    )
    band = base.mark_area(opacity=0.15).encode(
        x, alt.Y("low:Q", title=y, scale=scale), alt.Y2("high:Q"), colour(methods)
    )
    data = alt.Chart(behaviour).transform_filter("datum.noise == noise")
    data = data.mark_rule(strokeDash=[6, 4], strokeWidth=2).encode(alt.Y("data_return_mean:Q"))
    final = alt.Data(values=[row for row in curves if row["update"] == steps])
    base = alt.Chart(final, height=260, title="Final return against the noise; dashed: the data")
    base = base.transform_filter("shown == 'all' || datum.method == shown")
    x = alt.X(
        "noise:Q",
        title="controller's noise (share of random actions)",
        axis=alt.Axis(values=[0, 0.2, 0.4, 0.6, 0.8, 1]),
    )
    ends = base.mark_line(strokeWidth=3).encode(
        x, alt.Y("return_mean:Q", title=y, scale=scale), colour(methods)
    )
    now = base.transform_filter("datum.noise == noise")
    spots = now.mark_point(filled=True, size=90, opacity=1).encode(
        x, alt.Y("return_mean:Q"), colour(methods)
    )
    all_data = (
        alt.Chart(behaviour)
        .mark_line(strokeDash=[6, 4], strokeWidth=2)
        .encode(x, alt.Y("data_return_mean:Q"))
    )
    mark = alt.Chart(alt.Data(values=[{}])).transform_calculate(noise="noise")
    mark = mark.mark_rule(opacity=0.5).encode(alt.X("noise:Q"))
    return (
        concat(band + line + data, ends + all_data + mark + spots, params=[noise, method]),
        "Data quality",
        "CartPole logs of a good controller that acts at random with some probability: never at 0, "
        "always at 1. Bands: the range of three seeds.",
        quality_in_words(rows, curves, steps),
        "python benchmarks/demos.py",
        "Make the data worse",
    )


def quality_in_words(rows, curves, steps):
    last = {(r["method"], r["noise"]): r["return_mean"] for r in curves if r["update"] == steps}
    data = {row["noise"]: row["data_return_mean"] for row in rows}
    methods = list(dict.fromkeys(m for m, _ in last))
    at = {
        noise: ", ".join(f"{m} {last[m, noise]:.0f}" for m in methods if (m, noise) in last)
        for noise in (0.0, 0.8, 1.0)
    }
    return (
        "The likeliest action of noisy data is still the controller's, and behaviour cloning takes "
        f"it: at noise 0.8 the data earn {data[0.8]:.0f}, {at[0.8]}; at 1, where nothing is "
        f"left to copy, {at[1.0]}. Short runs, three seeds."
    )


def ope():
    rows = read("ope")
    policies = sorted({(row["distance"], row["policy"]) for row in rows})
    names = [policy for _, policy in policies]
    sizes = sorted({row["n"] for row in rows})
    estimators = list(dict.fromkeys(row["estimator"] for row in rows))
    for row in rows:
        row["i"], row["j"] = sizes.index(row["n"]), names.index(row["policy"])
        row["judged"] = (
            "a 95% interval" if row["printed_as_95"] == "True" else "marked: not to be believed"
        )
        row["lines"] = textwrap.wrap(row["verdict"], 46)
    few = slider("i", "logged episodes ", 0, len(sizes) - 1, 1, 2)
    far = slider("j", "distance of the judged policy ", 0, len(names) - 1, 1, 0)
    here = "datum.i == i && datum.j == j"
    fields = "estimator estimate low high judged i j".split()
    base = alt.Chart(
        table(rows, *fields),
        height=260,
        title=title(
            f"{[int(n) for n in sizes]}[i] + ' episodes; '"
            f" + format({[d for d, _ in policies]}[j], '.1%') + ' of the steps differ'"
        ),
    ).transform_filter(here)
    x_title = "discounted return of CartPole, 50 steps (cut at 60)"
    x = {"title": x_title, "scale": alt.Scale(domain=[0, 60], clamp=True)}
    y = alt.Y("estimator:N", title=None, sort=estimators)
    scale = alt.Scale(
        domain=["a 95% interval", "marked: not to be believed"], range=["#0072B2", "#E69F00"]
    )
    kind = alt.Color("judged:N", title=None, scale=scale)
    form = alt.Shape(
        "judged:N", title=None, scale=alt.Scale(domain=scale.domain, range=["circle", "cross"])
    )
    interval = base.mark_rule(strokeWidth=4).encode(alt.X("low:Q", **x), alt.X2("high:Q"), y, kind)
    point = base.mark_point(filled=True, size=90, opacity=1).encode(
        alt.X("estimate:Q", **x), y, kind, form
    )
    once = {(row["i"], row["j"]): row for row in rows}  # what all estimators of a panel share
    shared = "i j truth logged ess lines".split()
    facts = alt.Chart(
        alt.Data(values=[{k: row[k] for k in shared} for row in once.values()])
    ).transform_filter(here)
    truth = facts.mark_rule(strokeWidth=2).encode(alt.X("truth:Q", **x))
    logged = facts.mark_rule(strokeWidth=2, strokeDash=[6, 4]).encode(alt.X("logged:Q", **x))
    said = alt.Chart(facts.data, height=150, title=title("'What ope.py says'")).transform_filter(
        here
    )
    ess = said.transform_calculate(
        text="'effective sample size ' + format(datum.ess, '.1f')"
        " + ', truth ' + format(datum.truth, '.2f')"
    )
    left = {"align": "left", "x": 0, "fontSize": 13}
    ess = ess.mark_text(**left, y=14, fontWeight="bold").encode(text="text:N")
    verdict = said.mark_text(**left, y=40, baseline="top", lineHeight=18).encode(text="lines:N")
    held = defaultdict(list)
    for row in rows:
        held[row["judged"]].append(row["low"] <= row["truth"] <= row["high"])
    counts = [f"{sum(held[x])} of {len(held[x])}" for x in scale.domain]
    return (
        concat(interval + truth + logged + point, ess + verdict, params=[few, far]),
        "Can you believe the estimate?",
        "ope.py judges a policy from the logs of another. Solid line: the truth; dashed: the "
        "logged policy's return in these logs.",
        f"Of the intervals that it prints as 95% intervals {counts[0]} hold the truth in these "
        f"logs (one log of each size); of those that it marks {counts[1]}.",
        "python benchmarks/ope_estimates.py",
        "Change how much was logged, and how far the policy is",
    )


def write():
    specs, sections = [], ""
    for i, make in enumerate((online, shift, conservatism, quality, ope), 1):
        chart, *texts = make()
        specs.append(chart.to_dict())
        names = "heading sentence discovery command ask".split()
        texts = dict(zip(names, map(html.escape, texts), strict=True))
        sections += SECTION.format(i=i, **texts)
    template = (ROOT / "benchmarks/page.html").read_text()
    page = template.replace("@SECTIONS@", sections)
    page = page.replace("@SPECS@", json.dumps(specs, separators=(",", ":")).replace("</", "<\\/"))
    page = page.replace(
        "@LIBRARY@", vl_convert.javascript_bundle(LIBRARY).replace("</script", "<\\/script")
    )
    (ROOT / "docs/index.html").write_text(page)


if __name__ == "__main__":
    write()
