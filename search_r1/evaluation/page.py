"""Makes one self-contained HTML page of finished evaluations: scores, plots and behaviour."""

import re
from html import escape
from io import StringIO
from itertools import cycle
from math import ceil
from textwrap import fill
from typing import TYPE_CHECKING, Any

from search_r1.evaluation.summary import ALL, AVERAGE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.container import BarContainer
    from matplotlib.figure import Figure

Results = dict[str, dict[str, Any]]
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart. Grey replaces their
black, on which whiskers could not be seen."""
BARS = [{"facecolor": color, "hatch": hatch} for hatch in (None, "/////") for color in COLORS]
POINTS = [
    {"color": color, "fillstyle": style, "ls": "", "ms": 7}
    for style in ("full", "none")
    for color in COLORS
]
COLUMNS = (
    "searches",
    "no_search",
    "answered",
    "valid_actions",
    "gold_retrieved",
    "right_if_gold_retrieved",
    "premature_answers",
    "searches_after_gold",
    "duplicate_queries",
    "over_search",
    "under_search",
)
RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "page",
    "text.parse_math": False,
    "font.size": 9,
    "grid.alpha": 0.3,
    "axes.titlelocation": "left",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "hatch.color": "white",
    "axes.titlesize": 9,
    "axes.grid": True,
    "axes.grid.axis": "y",
}
CSS = """:root{color-scheme:light dark;--ink:#1c1e21;--soft:#5f6670;--line:#d9dce1;--paper:#fff}
@media(prefers-color-scheme:dark){
  :root{--ink:#e6e8eb;--soft:#a0a7b2;--line:#3a3f47;--paper:#16181c}
}
body{
  font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:76rem;
  margin:2rem auto;padding:0 1rem;
}
h1,h2,h3{line-height:1.25;overflow-wrap:anywhere}
h2{margin-top:2.5rem}
.wide,figure{overflow-x:auto}
table{border-collapse:collapse;font-size:.8125rem;font-variant-numeric:tabular-nums}
th[scope=row]{font-weight:400}
th,td{padding:.35rem .4rem;text-align:right;vertical-align:top;border-bottom:1px solid var(--line)}
th[scope=col]{vertical-align:bottom}
th:first-child{text-align:left;min-width:8rem}
small{display:block;white-space:nowrap}
small,p{color:var(--soft)}
p,figcaption{font-size:.875rem}
svg{display:block;width:100%;height:auto;min-width:40rem}
figure{
  margin:1rem 0;padding:.75rem;background:#fff;color:#40464f;border:1px solid var(--line);
  border-radius:8px;
}"""


def page(results: Results, title: str = "Evaluation") -> str:
    """The HTML page of `results`, which are summaries of `summary.summarize` by name."""
    sets = set_names(results)
    columns = [*sets, AVERAGE]
    rows = [[name, *score_cells(summary, columns)] for name, summary in results.items()]
    blocks = (
        f"<h3>{escape(name)}</h3>\n{behaviour_table(s, results)}" for name, s in results.items()
    )
    return f"""<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">
<title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head>
<body><h1>{escape(title)}</h1>
<h2>Exact match</h2>
{html_table(["result", *columns], rows)}
<p>Below a score: its 95 % interval over questions.
Average: unweighted, over the sets that the result has.</p>
{figures(results)}<h2>Behaviour</h2>
<p>Searches: mean. Valid actions: of the turns. Right: of the samples that retrieved all gold
passages. After gold and duplicate: of the searches. Over-search: of the questions known without,
under-search: of the rest. –: unknown.</p>
{"".join(blocks)}</body></html>\n"""


def set_names(results: Results) -> list[str]:
    """The names of the question sets of all results, in the order in which they occur.

    Only the entries of sets, and that of all, have counts of searches.
    """
    names: dict[str, None] = {}
    for summary in results.values():
        found = [n for n, row in summary.items() if n != ALL and "search_counts" in row]
        names |= dict.fromkeys(found)
    return list(names)


def score_cells(summary: dict[str, Any], columns: list[str]) -> list[str]:
    """The score of a result in each column, a dash where it has none."""
    return [score(summary[name]) if name in summary else "–" for name in columns]


def score(row: dict[str, Any]) -> str:
    """A cell with EM, and with its interval below it if there is one."""
    low, high = row.get("em_interval", (None, None))
    return f"{row['em']:.3f}" + (f"<small>{low:.3f}–{high:.3f}</small>" if low is not None else "")


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table. `head` and the first column are text, the other cells are HTML."""
    lines = ["".join(f'<th scope="col">{escape(name)}</th>' for name in head)]
    lines += [
        f'<th scope="row">{escape(name)}</th><td>{"</td><td>".join(cells)}</td>'
        for name, *cells in rows
    ]
    return '<div class="wide"><table>\n<tr>' + "</tr>\n<tr>".join(lines) + "</tr>\n</table></div>\n"


def behaviour_table(summary: dict[str, Any], results: Results) -> str:
    """The table of a result with a row for each set. All results have the same columns."""
    reasons: set[str] = set()
    for result in results.values():
        reasons.update(key for key in result[ALL]["behaviour"] if key.startswith("stop/"))
    columns = (*COLUMNS, *sorted(reasons - {"stop/answer"}))  # `answered` is the same figure
    sets = [name for name in set_names(results) if name in summary]
    rows = []
    for name in [*sets, ALL] if len(sets) > 1 else sets:
        # A set lacks the reasons for which none of its trajectories stopped.
        known = dict.fromkeys(reasons, 0.0) | summary[name]["behaviour"]
        cells = (f"{known[key]:.3f}" if key in known else "–" for key in columns)
        rows.append([name, str(summary[name]["questions"]), *cells])
    head = (key.replace("stop/", "stop: ").replace("_", " ") for key in columns)
    return html_table(["set", "questions", *head], rows)


def figures(results: Results) -> str:
    """The plots as <figure> elements with inline SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot: needs no display, leaves no state

    plots = [
        (plot_scores, "EM per set, with 95 % intervals"),
        (plot_counts, "Searches per question"),
        (plot_scatter, "EM against searches per question: colour tells the result, shape the set"),
    ]
    elements = []
    for number, (plot, label) in enumerate(plots, 1):
        file = StringIO()
        with rc_context(RC):
            figure = Figure(layout="constrained")
            plot(figure, results)
            figure.savefig(file, format="svg", metadata={"Date": None})
        svg = inline_svg(file.getvalue(), f"figure{number}-", label)
        caption = f"<figcaption>Figure {number}. {label}.</figcaption>"
        elements.append(f"<figure>{svg}{caption}</figure>\n")
    return "".join(elements)


def inline_svg(text: str, id_prefix: str, label: str) -> str:
    """An SVG file as an element of a page: it fills the width, and its ids are made unique."""
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{id_prefix}", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def plot_scores(figure: "Figure", results: Results) -> None:
    """Draws the EM of every set as a group of bars, one bar for each result."""
    axis = figure.subplots()
    sets = set_names(results)
    width = min(0.8 / len(results), 0.15)
    bars = []
    for i, summary in enumerate(results.values()):
        offset = (i - (len(results) - 1) / 2) * width
        rows = {j + offset: summary[s] for j, s in enumerate(sets) if s in summary}
        bars.append(draw_bars(axis, rows, 0.9 * width, BARS[i % len(BARS)]))
    is_crowded = len(sets) * max(map(len, sets)) > 90
    rotation, ha = (25, "right") if is_crowded else (0, "center")
    axis.set_xticks(range(len(sets)), [fill(s, 40) for s in sets], rotation=rotation, ha=ha)
    axis.set(ylabel="EM", xlim=(-0.6, len(sets) - 0.4), ylim=(0, None))
    legend(figure, bars, list(results))


def draw_bars(
    axis: "Axes", rows: dict[float, dict[str, Any]], width: float, style: dict[str, Any]
) -> "BarContainer":
    """Draws a bar of EM, with its interval as whiskers, at the position of each row."""
    em = [row["em"] for row in rows.values()]
    below = [abs(row["em_interval"][0] - row["em"]) for row in rows.values()]
    above = [abs(row["em_interval"][1] - row["em"]) for row in rows.values()]
    whiskers = {"yerr": [below, above], "ecolor": "#40464f"}
    return axis.bar(list(rows), em, width, **whiskers, **style)


def plot_counts(figure: "Figure", results: Results) -> None:
    """Draws a histogram of searches for each result, all with the same axes."""
    lines = ceil(len(results) / 5)
    columns = max(3, ceil(len(results) / lines))
    first = None
    for i, (name, summary) in enumerate(results.items()):
        counts = {
            int(made): n for made, n in summary[ALL]["search_counts"].items()
        }  # keys are text in JSON
        first = axis = figure.add_subplot(lines, columns, i + 1, sharex=first, sharey=first)
        axis.bar(
            list(counts),
            [n / sum(counts.values()) for n in counts.values()],
            0.85,
            **BARS[i % len(BARS)],
        )
        axis.set(
            title=fill(name, 130 // columns),
            xlabel="searches",
            ylabel="share of samples",
            ylim=(0, 1),
        )
        axis.locator_params(axis="x", integer=True)
    figure.set_size_inches(11, 2.5 * lines)


def plot_scatter(figure: "Figure", results: Results) -> None:
    """Draws a point for each result and set."""
    axis = figure.subplots()
    sets = dict(zip(set_names(results), cycle("os^DvPX*<>pH"), strict=False))
    handles = []
    axis.plot(0, 0, alpha=0)  # the axes begin at 0
    for look, summary in zip(cycle(POINTS), results.values(), strict=False):
        handles += axis.plot([], [], marker="o", **look)
        for row, marker in (
            (summary[name], marker) for name, marker in sets.items() if name in summary
        ):
            axis.plot(row["behaviour"]["searches"], row["em"], marker=marker, **look)
    handles += [
        axis.plot([], [], marker=marker, color="#40464f", ls="")[0] for marker in sets.values()
    ]
    axis.set(xlabel="searches per question", ylabel="EM")
    legend(figure, handles, [*results, *sets])


def legend(figure: "Figure", handles: list[Any], names: list[str]) -> None:
    """Draws a legend right of the axes, and makes the figure high enough for it."""
    labels = [fill(name, 28) for name in names]
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    figure.set_size_inches(11, max(4.0, 0.19 * "\n".join(labels).count("\n") + 0.7))
