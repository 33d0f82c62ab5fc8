"""One self-contained page of everything: tables, curves of every run, costs, deviations."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from html import escape
from pathlib import Path

from sam_repro.paper.deviations import deviations_path
from sam_repro.paper.estimate import row_costs
from sam_repro.paper.ledger_join import JoinedTable, join_tables
from sam_repro.paper.outcomes import curve
from sam_repro.paper.render.chart import line_chart
from sam_repro.paper.render.html import cell, grid, notes, page
from sam_repro.paper.render.sheet import hours_words, sheet_of
from sam_repro.records.ledger import Row

SCRIPT = """
document.querySelectorAll('table').forEach(table => table.querySelectorAll('th').forEach((th, column) => {
  th.classList.add('sortable'); th.title = 'sort';
  th.onclick = () => {
    const body = table.tBodies[0], up = th.dataset.up = th.dataset.up === '1' ? '' : '1';
    const value = row => { const t = row.cells[column].textContent, n = parseFloat(t); return isNaN(n) ? t : n; };
    const order = (a, b) => { const x = value(a), y = value(b);
      return typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === 'number' ? -1 : 1; };
    [...body.rows].sort((a, b) => up ? order(a, b) : order(b, a)).forEach(row => body.append(row));
  };
}));
const filter = document.getElementById('filter');
filter.oninput = () => {
  const words = filter.value.toLowerCase().split(/\\s+/).filter(Boolean);
  document.querySelectorAll('.filterable').forEach(item => {
    const text = (item.dataset.words || item.textContent).toLowerCase();
    item.hidden = !words.every(w => text.includes(w));
  });
  // A row answers to the words of its table's title too, but not where some row's id has the word as a part: gsam
  document.querySelectorAll('.filterable').forEach(item => {
    const rows = [...item.querySelectorAll('tbody tr')], title = (item.dataset.title || '').toLowerCase();
    const named = new Set(rows.flatMap(row => row.dataset.words.toLowerCase().split('/')));
    rows.forEach(row => {
      const text = (row.dataset.words + ' ' + row.textContent).toLowerCase();
      row.hidden = !words.every(w => text.includes(w) || title.includes(w) && !named.has(w));
    });
  });
  document.querySelectorAll('[data-of]').forEach(row => {
    row.hidden = document.getElementById(row.dataset.of).hidden;
  });
};
addEventListener('hashchange', reveal); reveal();
function reveal() {
  const at = document.getElementById(location.hash.slice(1));
  if (at && at.tagName === 'DETAILS') at.open = true;
}
"""


def report(names: list[str], ledger_dir: Path | None = None) -> str:
    """The page as text.

    Args:
        names: tables; empty for all whose runs go to the committed ledger.
        ledger_dir: folder of ledger rows; None takes the tables' own.
    """
    return assemble(join_tables(names, ledger_dir))


def assemble(parts: list[JoinedTable]) -> str:
    """The whole page."""
    rows = {k: row for part in parts for k, row in part.rows.items()}
    body = [
        "<header><h1>Sharpness-aware training, reproduced</h1>",
        "<p>Every table and figure of GSAM (ICLR 2022) and Eigen-SAM (NeurIPS 2024) beside our own runs. A number "
        "of ours is a mean over seeds with its 95 % interval; “within” means that the interval holds the printed "
        "number.</p></header>",
        tiles(parts, rows),
        '<nav><a href="#tables">Tables</a><a href="#runs">Runs</a><a href="#costs">Costs</a>'
        '<a href="#deviations">Deviations</a></nav>',
        '<input id="filter" type="search" placeholder="Filter: vit_b32 gsam, table 1, D-04 …" aria-label="Filter">',
        '<h2 id="overview">Overview</h2>',
        overview(parts),
        '<h2 id="tables">Tables and figures</h2>',
        *map(table_part, parts),
        '<h2 id="runs">Runs</h2>',
        "".join(map(run_part, sorted(rows.values(), key=lambda r: r["run_id"]))) or '<p class="soft">No run yet.</p>',
        '<h2 id="costs">Costs</h2>',
        costs(parts),
        '<h2 id="deviations">Deviations</h2>',
        deviations(),
    ]
    return page("Sharpness-aware training, reproduced", "\n".join(body), SCRIPT)


def tiles(parts: list[JoinedTable], rows: dict[str, Row]) -> str:
    """The few numbers that say where the project stands."""
    verdicts = Counter(c.verdict for part in parts for o in part.outcomes for c in o.cells)
    wanted = len(set().union(*(part.runs for part in parts)))
    judged = verdicts["within"] + verdicts["above"] + verdicts["below"]
    numbers = [
        (f"{len(rows)} / {wanted}", "runs in the ledger"),
        (f"{judged}", "numbers compared"),
        (f"{verdicts['within']}", "within the paper's"),
        (f"{verdicts['below']}", "below"),
        (f"{verdicts['above']}", "above"),
        (f"{verdicts['not in our sources']}", "not in our sources"),
        (f"{hours_words(sum(r.get('hours', 0) for r in rows.values()))} h", "processor hours"),
    ]
    return '<div class="tiles">' + "".join(f'<div class="tile"><b>{n}</b>{t}</div>' for n, t in numbers) + "</div>"


def overview(parts: list[JoinedTable]) -> str:
    """One line a table."""
    head = ("table", "rows", "runs", "of", "within", "above", "below", "diverged", "one seed", "pending")
    lines = []
    for part in parts:
        words = Counter(c.verdict for o in part.outcomes for c in o.cells)
        counts = [len(part.table.rows), len(part.rows), len(part.runs)]
        counts += [words[w] for w in head[4:]]
        name = f'<td class="left"><a href="#{part.table.name}">{escape(part.table.title)}</a></td>'
        lines.append(f'<tr data-of="{part.table.name}">{name}{"".join(cell(str(c or "–")) for c in counts)}</tr>')
    titles = "".join(f"<th>{h}</th>" for h in head)
    return (
        f'<div class="scroll wide"><table><thead><tr>{titles}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def table_part(part: JoinedTable) -> str:
    """A table that folds; open where it has results."""
    t = part.table
    state = f"cannot be planned yet: {part.problem}" if part.problem else f"{len(part.rows)} of {len(part.runs)} runs"
    head = f'<summary><h3>{escape(t.title)}</h3> <span class="soft">{escape(state)}</span></summary>'
    words = escape(
        " ".join(
            [t.name, t.title, *t.warnings, *(f"{r.id} {r.model} {r.method} {' '.join(r.warnings)}" for r in t.rows)]
        )
    )
    title = escape(" ".join([t.name, t.title, *t.warnings]))  # words that every row answers to
    opened = " open" if part.rows or t.name == "table1" else ""
    inner = f'<p class="soft">{escape(t.source)}</p>'
    if part.outcomes:
        s = sheet_of(t, part.outcomes)
        runs = [{str(row["seed"]): row["run_id"] for row in o.ledger} for o in part.outcomes]
        inner += grid(s, runs, [o.row.id for o in part.outcomes]) + notes(s)
    return (
        f'<details id="{t.name}" class="filterable" data-words="{words}" data-title="{title}"'
        f"{opened}>{head}{inner}</details>"
    )


def run_part(row: Row) -> str:
    """A run that folds: result, curves, provenance and the command that repeats it."""
    scores = ", ".join(f"{k} {100 * v['correct'] / v['total']:.2f} %" for k, v in row["evals"].items())
    state = escape(f"{row['status']}: {scores}" if scores else row["status"])
    head = f'<summary><h3>{row["run_id"]}</h3> <span class="soft">{state}</span></summary>'
    steps = curve(row, "step")
    points = {
        name: [(s, v) for s, v in zip(steps, curve(row, name), strict=False) if s is not None and v is not None]
        for name in ("loss", "loss_robust", "surrogate_gap", "cosine", "lr", "rho")
    }
    evals = row.get("curves", {}).get("eval", [])
    accuracy = {
        name: [(e["step"], 100 * e["correct"] / e["total"]) for e in evals if e["eval"] == name]
        for name in dict.fromkeys(e["eval"] for e in evals)
    }
    charts = [line_chart(f"accuracy on {name}, %", [("first", line)]) for name, line in accuracy.items()]
    charts.append(
        line_chart("loss, clean and perturbed", [("first", points["loss"]), ("second", points["loss_robust"])])
    )
    if any(rho for _, rho in points["rho"]):
        charts += [line_chart("surrogate gap h", [("first", points["surrogate_gap"])])]
        charts += [line_chart("cos θ", [("first", points["cosine"])])]
    measured = row.get("curves", {}).get("sharpness", [])
    for title, key in (("λ_max of the Hessian", "lambda_max"), ("|cos(ε, v)|", "alignment")):
        charts.append(line_chart(title, [("first", [(m["step"], m[key]) for m in measured])]))
    charts.append(line_chart("learning rate", [("first", points["lr"])], digits=2))
    facts = f"{row.get('world', 1)} x {row['hardware']}, {row.get('dtype', '')}, m = {row.get('m', '–')}, "
    facts += f"{row.get('hours', 0):.3g} processor hours, {row.get('finished', '')}, commit {row['commit'][:12]}"
    facts += " with local changes" if row["dirty"] else ""
    s = row.get("sharpness", {})
    if "lambda_max" in s:
        facts += f"; λ_max {s['lambda_max']:.4g} (residual {s['residual']:.1g}), 2h/ρ² {s['estimate']:.4g} at ρ "
        facts += f"{s['rho']:.3g}, |cos(ε, v)| {s['alignment']:.3f}, on {s['images']} training images"
    command = "python train.py " + shlex.join(row.get("overrides", []))
    return (
        f'<details id="{row["run_id"]}" class="filterable">{head}<div class="charts">{"".join(charts)}</div>'
        f'<p class="soft">{escape(facts)}</p><pre>{escape(command)}</pre></details>\n'
    )


def costs(parts: list[JoinedTable]) -> str:
    """EFLOP planned and hours spent a table; `sam-repro estimate` adds hours and money for given hardware."""
    lines = []
    for part in parts:
        known = row_costs(part.table, part.outcomes, []).values()
        eflop = sum(c.eflop or 0 for c in known)
        spent = sum(row.get("hours", 0.0) for row in part.rows.values())
        cells = [
            f"{sum(c.images for c in known):.3g}",
            f"{eflop:.3g}" if eflop else "–",
            hours_words(spent) if spent else "–",
        ]
        lines.append(
            f'<tr><td class="left">{escape(part.table.title)}</td>{"".join(f"<td>{c}</td>" for c in cells)}</tr>'
        )
    head = "<th>table</th><th>images</th><th>EFLOP</th><th>processor hours so far</th>"
    said = '<p class="soft">All seeds; runs that tables share count in each. Hours and money: sam-repro estimate.</p>'
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>{said}'
    )


def deviations() -> str:
    """docs/DEVIATIONS.md, folded an entry."""
    path = deviations_path()
    text = path.read_text() if path.is_file() else ""
    entries = re.findall(r"^## (D-\d+) (.+)\n((?:(?!^#).*\n?)*)", text, flags=re.MULTILINE)
    return "\n".join(
        f'<details id="{key}" class="filterable"><summary><h3>{key}</h3> {escape(title)}</summary>'
        f"<p>{escape(' '.join(body.split()))}</p></details>"
        for key, title, body in entries
    )
