"""The card of an MMPR data set: README.md with the configurations `load_dataset` reads, and statistics as pictures."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.files import atomic_writer
from internvl_mpo.mmpr.manifest import read_manifest, safe_name
from internvl_mpo.mmpr.statistics import FAMILIES, SIDES, ReleaseStatistics, bin_start, family_of
from internvl_mpo.records import RULES

PICTURES = "pictures"
COLOURS = {"question": "#6b7280", "chosen": "#15803d", "rejected": "#b91c1c"}

_INTRODUCTION = """\
# {title}

{num_rows:,} preference pairs for vision-language models from {num_sources} data sets: for a question about pictures
a *chosen* and a *rejected* response. Pictures are inside, byte for byte as they were published; one line loads
everything:

```python
from datasets import load_dataset

pairs = load_dataset("{name}", "tiny", split="train")  # a few rows of every subset
pairs = load_dataset("{name}", "{example}", split="train", streaming=True)  # one source, without waiting
pairs = load_dataset("{name}", split="train")  # all of it
```

It trains as it is in TRL's `DPOTrainer` (columns `images`, `prompt`, `chosen`, `rejected`), and with MPO for
InternVL, which made this folder: `train_mpo.py --data hub:{name}`.

## Columns

| column | what it holds |
|---|---|
| `id` | stable id of the pair, from its content unless the release gave one |
| `images` | the pictures in the order of the question; empty for text-only rows |
| `prompt` | one user message of content blocks, `image` blocks where the pictures stand |
| `chosen`, `rejected` | one assistant message each |
| `question` | the question as MMPR spells it, `<image>` placeholders included |
| `answer` | ground truth; null where there is none |
| `source`, `rule` | data set of the question; why chosen is preferred, see below |
| `subset`, `repeat_time`, `max_dynamic_patch` | name and settings in MMPR's meta.json |
| `image_root`, `image_paths` | where the pictures lay in the release |
| `provenance` | JSON: how the pair was made |
| `raw` | JSON: what it takes to write the original row again; mostly null |

| rule | chosen is preferred because |
|---|---|
| `correctness` | its final answer is right, the rejected one's is wrong |
| `format` | its final answer is right, the rejected one has none that can be read |
| `direct` | as `correctness`, answered without reasoning |
| `dropout_ntp` | the rejected response goes on from its first half without seeing the picture |
| `prefix_with_image` | the rejected response goes on from a part of it with the picture |
| `other` | says the source (RLAIF-V: a divided judgement by a model) |

`repeat_time` is how often a subset is seen in an epoch of the published recipe: below 1 a random part of its rows.
Here all rows are present; sampling is the trainer's business.
"""

_FACTS = """\
## Where it comes from

MMPR, the multimodal preference data set of OpenGVLab, was published with *Enhancing the Reasoning Ability of
Multimodal Large Language Models via Mixed Preference Optimization* (arXiv 2411.10442) under the MIT licence.
Pictures and questions come from public data sets, which keep their own licences: read those of a source before you
use its pictures elsewhere.

| release | what is known of it |
|---|---|
| v1.0 | 90 subsets, responses of InternVL2-8B; 750 k pairs without clear ground truth, 2.5 M with; 1 M per epoch |
| v1.1 | more sources; used for InternVL2.5-MPO, about 400 k pairs per epoch |
| v1.2 | rollouts of InternVL3; used for InternVL3 and 3.5, about 300 k to 400 k pairs per epoch |

Things to know:

- **Length.** In v1.0 rejected responses are about 20 % shorter than chosen ones in the Dropout-NTP part and about
  17 % longer in the correctness part. The table below says how it is here.
- **M3CoT is in the domain.** Its training split is among the sources of the official releases, so a score on
  M3CoT's test split after training on them is an in-domain result.
- The authors withheld instructions from the InternVL demo for privacy: the published checkpoints saw data that
  nobody else has.
"""


def write_card(folder: Path, *, name: str = "org/MMPR", title: str = "MMPR") -> None:
    """Write README.md and `pictures/` of a converted folder.

    Args:
        folder: with manifest.json.
        name: repository it will have on the Hub, for the examples.
        title: heading.
    """
    manifest = read_manifest(folder)
    statistics = ReleaseStatistics.from_json(manifest["statistics"])
    (folder / PICTURES).mkdir(exist_ok=True)
    drawn = draw_pictures(statistics, folder / PICTURES)
    sources = [shard["source"] for shard in manifest["shards"] if shard["path"].startswith("data/")]
    body = _INTRODUCTION.format(
        title=title,
        name=name,
        num_rows=manifest["num_rows"],
        num_sources=len(set(sources)),
        example=safe_name(sources[0]) if sources else "default",
    )
    parts = [
        "---",
        front_matter(manifest, title),
        "---",
        "",
        body,
        _FACTS,
        statistics_text(statistics, manifest, drawn),
    ]
    with atomic_writer(folder / "README.md") as out:
        out.write("\n".join(parts))


def configurations(shards: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the configurations: everything, one per family, one per source, and the tiny one."""
    sources: dict[str, str] = {}
    for shard in shards:
        if shard["path"].startswith("data/"):
            sources[safe_name(shard["source"])] = family_of(shard["source"])
    families: dict[str, list[str]] = defaultdict(list)
    for source, family in sources.items():
        families[family].append(source)
    made = [{"config_name": "default", "data_files": _train("data/*/train-*.parquet"), "default": True}]
    for family in (*FAMILIES, "other"):
        if families[family] and family not in sources:
            files = [f"data/{source}/train-*.parquet" for source in families[family]]
            made.append({"config_name": family, "data_files": _train(files)})
    made += [
        {"config_name": source, "data_files": _train(f"data/{source}/train-*.parquet")}
        for source in sources
        if source not in ("default", "tiny")
    ]
    if any(shard["path"].startswith("tiny/") for shard in shards):
        made.append({"config_name": "tiny", "data_files": _train("tiny/train-*.parquet")})
    return made


def front_matter(manifest: Mapping[str, Any], title: str) -> str:
    """Return the YAML head of the card."""
    import yaml

    head = {
        "pretty_name": title,
        "license": "mit",
        "language": ["en"],
        "task_categories": ["image-text-to-text", "visual-question-answering"],
        "tags": ["preference", "dpo", "mpo", "trl", "chain-of-thought", "multimodal"],
        "size_categories": [size_category(manifest["num_rows"])],
        "configs": configurations(manifest["shards"]),
    }
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=110).rstrip()


def size_category(num_rows: int) -> str:
    """Return the Hub's name for a number of rows."""
    marks = (("1K", 1e3), ("10K", 1e4), ("100K", 1e5), ("1M", 1e6), ("10M", 1e7), ("100M", 1e8))
    below = next((index for index, (_, limit) in enumerate(marks) if num_rows < limit), len(marks) - 1)
    return "n<1K" if below == 0 else f"{marks[below - 1][0]}<n<{marks[below][0]}"


def statistics_text(statistics: ReleaseStatistics, manifest: Mapping[str, Any], drawn: Sequence[str]) -> str:
    """Return the section of tables and pictures."""
    rules = [rule for rule in RULES if any(found == rule for _, found in statistics.rows)]
    sources = sorted({source for source, _ in statistics.rows}, key=lambda source: (family_of(source), source))
    lines = [
        "## Statistics",
        "",
        "Words are counted between spaces; a Chinese or Japanese character counts as one.",
        "",
    ]
    lines += _table(
        ["source", "family", "pairs", *rules],
        [
            [
                source,
                family_of(source),
                _total(statistics, source=source),
                *(statistics.rows[source, rule] for rule in rules),
            ]
            for source in sources
        ]
        + [["**all**", "", sum(statistics.rows.values()), *(_total(statistics, rule=rule) for rule in rules)]],
    )
    lines += [
        "",
        "Length in words, and how chosen compares with rejected (geometric mean of the ratio; share of longer ones):",
        "",
    ]
    lines += _table(
        ["rule", "question", "chosen", "rejected", "chosen / rejected", "chosen longer"],
        [[rule, *length_row(statistics, rule=rule)] for rule in rules],
    )
    tokens = [(side, statistics.sums["tokens", side]) for side in SIDES if statistics.sums.get(("tokens", side))]
    if tokens:
        lines += [
            "",
            f"Mean tokens over a sample of {tokens[0][1]['texts']:,} pairs: "
            + ", ".join(f"{side} {counts['tokens'] / counts['texts']:.1f}" for side, counts in tokens)
            + ".",
        ]
    shown = dict(sorted(statistics.images_per_row.items()))
    lines += ["", "Pictures per pair: " + ", ".join(f"{count}: {number:,}" for count, number in shown.items()) + "."]
    formats = ", ".join(f"{name} {number:,}" for name, number in statistics.image_formats.most_common())
    if formats:
        lines += [
            f"Distinct pictures (counted per shard): {sum(statistics.image_formats.values()):,}, "
            f"{statistics.image_bytes / 1e6:,.1f} MB ({formats}).",
        ]
    if manifest["num_rejects"]:
        lines += ["", f"{manifest['num_rejects']:,} lines of the release could not be converted."]
    for file, caption in drawn:
        lines += ["", f"![{caption}]({PICTURES}/{file})"]
    return "\n".join(lines) + "\n"


def length_row(statistics: ReleaseStatistics, *, source: str | None = None, rule: str | None = None) -> list[str]:
    """Return mean words of question, chosen and rejected, the mean ratio, and how often chosen is longer."""
    sums: dict[str, Counter] = defaultdict(Counter)
    for key, counts in statistics.sums.items():
        if len(key) == 3 and source in (None, key[0]) and rule in (None, key[1]):
            sums[key[2]].update(counts)
    cells = [f"{sums[side]['words'] / max(1, sums[side]['texts']):.1f}" for side in SIDES]
    number = max(1, sums["chosen"]["texts"])
    return [*cells, f"{math.exp(sums['pair']['log_ratio'] / number):.2f}", f"{sums['pair']['longer'] / number:.0%}"]


def draw_pictures(statistics: ReleaseStatistics, folder: Path) -> list[tuple[str, str]]:
    """Draw the histograms and return (file, caption) of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn = []

    def save(figure: Any, file: str, caption: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / file, dpi=110, metadata={"Software": None})
        plt.close(figure)
        drawn.append((file, caption))

    counts = Counter()
    for (source, rule), number in statistics.rows.items():
        counts[source, rule] += number
    sources = [source for source, _ in _by_source(statistics).most_common(40)][::-1]
    rules = [rule for rule in RULES if any(found == rule for _, found in statistics.rows)]
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.24 * len(sources)))
    left = [0] * len(sources)
    for rule, colour in zip(rules, plt.cm.tab10.colors, strict=False):
        widths = [counts[source, rule] for source in sources]
        axis.barh(sources, widths, left=left, label=rule, color=colour)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axis.set_xlabel("pairs")
    axis.set_title(f"{sum(left):,} pairs by source and rule")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, "sources.png", "Pairs by source and rule")

    for kind, histograms in (("words", statistics.lengths), ("tokens", statistics.tokens)):
        if histograms:
            draw_lengths(histograms, kind, folder / f"{kind}.png")
            drawn.append((f"{kind}.png", f"Length in {kind}"))

    if statistics.image_sides:
        figure, axis = plt.subplots(figsize=(5.4, 4.6))
        xs, ys, numbers = zip(
            *((bin_start(x), bin_start(y), number) for (x, y), number in statistics.image_sides.items()), strict=True
        )
        largest = max(numbers)
        shown = axis.scatter(xs, ys, s=[20 + 180 * number / largest for number in numbers], c=numbers, cmap="viridis")
        figure.colorbar(shown, label="pictures")
        axis.set(xlabel="width in pixels", ylabel="height in pixels")
        _doublings(axis.xaxis, axis.yaxis)
        axis.set_title(f"Sizes of {sum(numbers):,} pictures")
        save(figure, "image_sizes.png", "Sizes of the pictures")
    return drawn


def draw_lengths(histograms: Mapping[tuple, Mapping[int, int]], kind: str, file: Any) -> None:
    """Draw the lengths of questions and both responses.

    Args:
        histograms: of `ReleaseStatistics`; the last part of a key is the side.
        kind: "words" or "tokens".
        file: path or binary file of a PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    sides = _by_side(histograms)
    for side in SIDES:
        _steps(axis, sides[side], label=side, color=COLOURS[side], linestyle="--" if side == "rejected" else "-")
    _doublings(axis.xaxis)
    axis.set_xlabel(f"{kind} per text")
    axis.set_ylabel("texts")
    axis.set_title(f"Length of questions and responses in {kind}")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110, format="png", metadata={"Software": None})
    plt.close(figure)


def _doublings(*axes: Any) -> None:
    """Logarithmic axes that read 1, 2, 4, 8, ..."""
    from matplotlib.ticker import FormatStrFormatter

    for axis in axes:
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log", base=2)
        axis.set_major_formatter(FormatStrFormatter("%g"))


def _steps(axis: Any, histogram: Mapping[int, int], **style: Any) -> None:
    if histogram:
        bins = range(min(histogram), max(histogram) + 1)
        edges = [max(0.7, bin_start(number)) for number in [*bins, bins[-1] + 1]]
        axis.stairs([histogram.get(number, 0) for number in bins], edges, linewidth=1.8, **style)


def _by_side(histograms: Mapping[tuple, Mapping[int, int]]) -> dict[str, Counter]:
    sides: dict[str, Counter] = defaultdict(Counter)
    for key, counts in histograms.items():
        sides[key[-1]].update(counts)
    return sides


def _by_source(statistics: ReleaseStatistics) -> Counter:
    counts: Counter = Counter()
    for (source, _), number in statistics.rows.items():
        counts[source] += number
    return counts


def _total(statistics: ReleaseStatistics, *, source: str | None = None, rule: str | None = None) -> int:
    return sum(number for key, number in statistics.rows.items() if source in (None, key[0]) and rule in (None, key[1]))


def _train(paths: str | list[str]) -> list[dict[str, Any]]:
    return [{"split": "train", "path": paths}]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
