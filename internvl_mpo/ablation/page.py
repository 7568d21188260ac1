"""docs/ablation.md: its tables and figures are made of what was measured, its sentences are written by hand."""

import re
from pathlib import Path

from internvl_mpo.ablation.costs import cost_text
from internvl_mpo.ablation.figures import draw
from internvl_mpo.ablation.plan import Group, Plan
from internvl_mpo.ablation.results import PER_MODEL, PER_QUESTION, Results, Row, missing_text, shared_seeds
from internvl_mpo.ablation.signs import draw_signs, signs_table
from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer

NAMES = {
    **{"start": "start model", "sft": "SFT on chosen", "dpo": "DPO", "bco": "BCO", "mpo": "MPO", "rso": "RSO"},
    **{"ipo": "IPO", "cdpo": "cDPO", "robust_dpo": "RobustDPO", "sppo": "SPPO", "aot": "AOT", "tr_dpo": "TR-DPO"},
    **{"orpo": "ORPO", "dpo_norm": "length-normalised DPO", "dpop": "DPOP", "discopop": "DiscoPOP", "exo": "EXO"},
    **{"nca": "NCA", "apo_zero": "APO-zero", "apo_down": "APO-down", "aot_unpaired": "AOT, unpaired", "simpo": "SimPO"},
    **{"wpo": "DPO, WPO's weights", "ld_dpo": "LD-DPO", "first_step": "DPO on the first step that differs"},
    **{f"mpo_{share}to1": f"MPO {share}:1" for share in (1, 3, 5, 9)},
}


def write_page(path: Path, images: Path, plan: Plan, results: Results) -> list[str]:
    """Fill every `<!-- results: GROUP -->` of a page with the table of the group, and draw the figures.

    `<!-- costs -->` gets the processor time that worlds and models took, `<!-- signs: GROUP -->` what the logs of the
    group's runs said.

    Args:
        path: the page; what stands outside the marks is kept.
        images: folder of the figures.
        plan: holds the groups that the page may show.
        results: what was measured.

    Returns:
        Names of the groups that the page shows.

    Raises:
        BadInputError: the page names a group that the plan does not have.
    """
    known = {group.name: group for group in plan.groups}
    shown = []

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name not in known:
            raise BadInputError(f"{path} shows the group '{name}', which the plan does not have")
        shown.append(name)
        return f"<!-- results: {name} -->\n{_section(known[name], images, path, plan, results)}\n<!-- /results -->"

    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<!-- results: ([\w-]+) -->.*?<!-- /results -->", fill, text, flags=re.DOTALL)
    costs = f"<!-- costs -->\n{cost_text(plan, results.lanes)}\n<!-- /costs -->"
    text = re.sub(r"<!-- costs -->.*?<!-- /costs -->", lambda _: costs, text, flags=re.DOTALL)
    text = re.sub(
        r"<!-- signs: ([\w-]+) -->.*?<!-- /signs -->",
        lambda found: f"<!-- signs: {found[1]} -->\n{_signs(known[found[1]], images, path, results)}\n<!-- /signs -->",
        text,
        flags=re.DOTALL,
    )
    with atomic_writer(path) as out:
        out.write(text)
    return shown


def _section(group: Group, images: Path, page: Path, plan: Plan, results: Results) -> str:
    rows, missing = results.rows(group)
    shared = shared_seeds(rows)
    rows = [row.only(shared) for row in rows] if shared else rows
    parts = [table(group, rows, results)]
    figure = draw(group, rows, images, NAMES, plan) if group.figure else None
    if figure:
        parts.append(f"![{group.title}]({figure.relative_to(page.parent).as_posix()})")
    parts.append(missing_text(missing, group.name))
    return "\n\n".join(part for part in parts if part)


def _signs(group: Group, images: Path, page: Path, results: Results) -> str:
    rows = {show(row): row for row in results.rows(group)[0] if row.cell.method != "start"}
    if not rows:
        return "Not run yet."
    picture = images / "ablation_signs.png"
    draw_signs(rows, results.lanes, picture)
    return f"{signs_table(rows, results.lanes)}\n\n![chosen_change over the steps]({picture.relative_to(page.parent)})"


def table(group: Group, rows: list[Row], results: Results) -> str:
    """Return a Markdown table with a line for each cell."""
    head = ["", *PER_QUESTION, "more than SFT", *PER_MODEL, "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        baseline = results.baseline(row.cell)
        ahead = row.minus(baseline) if baseline and row.cell.method != "start" and row.cell != baseline.cell else None
        cells = [
            show(row),
            *(row.estimate(heading).text() for heading in PER_QUESTION),
            ahead.text(signed=True) if ahead else "",
            *(row.mean(heading) for heading in PER_MODEL),
            str(len(row.seeds)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show(row: Row) -> str:
    """Return the name of a cell as a reader knows it."""
    method = row.cell.method
    parts = [NAMES.get(part, part) for part in method.removesuffix("+").split("+")]
    name = "+".join(parts) + (" + SFT" if method.endswith("+") else "")
    return ", ".join([name, *(f"{key} {value}" for key, value in row.cell.varied)])
