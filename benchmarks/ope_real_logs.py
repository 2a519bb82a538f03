"""Two policies of a fashion shop, each with its log: what does ope.py say of one from the log of
the other? Open Bandit Dataset (Saito et al. 2020, arXiv 2008.07146; CC BY 4.0), the 10,000 rows per
policy and campaign that the package obp carries. A row is an item shown in one of three positions
and whether it was clicked: an episode of one step.

    pip install --no-deps obp
    python benchmarks/ope_real_logs.py [all] [men] [women]

The log of the uniformly random policy is to judge Thompson sampling (BTS), whose own log has the
truth. BTS changed with time; what is judged is its mean: how often it showed each item in each
position. Prints a row of the README's table for each campaign.
"""

import contextlib
import csv
import importlib.util
import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from gymnasium import spaces

sys.path.insert(0, str(Path(__file__).parent.parent))
import ope


def read(policy, campaign):
    """Position (N,) from 0, item (N,), click (N,), propensity of the item (N,)."""
    package = Path(importlib.util.find_spec("obp").origin).parent
    with (package / f"dataset/obd/{policy}/{campaign}/{campaign}.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = "position", "item_id", "click", "propensity_score"
    position, item, click, propensity = (np.array([float(r[k]) for r in rows]) for k in names)
    return position.astype(int) - 1, item.astype(int), click, propensity


def judge(campaign):
    """Clicks per row: of the random log, of BTS by WDR and FQE with intervals, of BTS's own log."""
    args = ope.Args(steps=1000)
    position, item, click, propensity = read("random", campaign)
    bts_position, bts_item, bts_click, _ = read("bts", campaign)
    n, items = len(item), max(item.max(), bts_item.max()) + 1
    shown = np.zeros((3, items))
    np.add.at(shown, (bts_position, bts_item), 1)
    units = ope.Units(spaces.Box(0, 1, (3,)), spaces.Discrete(int(items)))
    obs = torch.eye(3)[position]
    data = SimpleNamespace(
        units=units,
        transitions=ope.Batch(obs, torch.as_tensor(item), units.tensor(click), obs, torch.ones(n)),
        episode=torch.arange(n),
        behavior_log_prob=np.log(propensity),
    )
    table = torch.as_tensor(shown / shown.sum(1, keepdims=True))
    policy = ope.Target("BTS", lambda x: ope.Probabilities(table[x.argmax(1)]), units, args)
    torch.manual_seed(0)
    report = ope.evaluate_policy(policy, ope.Log(data, args), args)
    ope.print_report(report)
    own = bts_click.mean(), np.sqrt(bts_click.var(ddof=1) / len(bts_click))
    return report, click, own


if __name__ == "__main__":
    ope.use_cpu_well()
    rows = []
    for campaign in sys.argv[1:] or ("all", "men", "women"):
        with contextlib.redirect_stdout(io.StringIO()) as text:
            report, click, own = judge(campaign)
        print(f"{campaign}: {text.getvalue()}")
        cells = [f"{click.mean():.4f} ({click.sum():.0f} clicks)"]
        for name in ("PDWIS", "WDR", "FQE"):
            e = report.estimates[name]
            cells.append(f"{e.value:.4f} ({e.low:.4f} to {e.high:.4f})")
        cells.append(f"{own[0]:.4f} ± {own[1]:.4f}")
        rows.append(f"| {campaign} | {' | '.join(cells)} |")
    print("| campaign | random log | BTS by PDWIS | by WDR | by FQE | BTS's own log |")
    print("|---|---|---|---|---|---|", *rows, sep="\n")
