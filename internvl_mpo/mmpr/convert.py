"""A raw MMPR release -> Parquet shards with the pictures' own bytes inside.

Two passes over the annotations, both in parallel and both in constant memory. The first gives every line its place:
which shard it goes to and whether its id was seen before. The second writes the shards, each by itself: a shard's bytes
depend on the release and the settings alone, a finished shard is never written again, and a killed run goes on.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_path, atomic_writer
from internvl_mpo.mmpr.files import relative
from internvl_mpo.mmpr.lines import Annotation, Member
from internvl_mpo.mmpr.manifest import MANIFEST, file_facts, read_manifest
from internvl_mpo.mmpr.parquet import arrow_schema
from internvl_mpo.mmpr.release import Subset
from internvl_mpo.mmpr.shard_plan import Options, Piece, Shard, map_in_processes, plan, progress_bar
from internvl_mpo.mmpr.shard_writer import ShardWriter, done_mark, token_counter, write_shard
from internvl_mpo.mmpr.statistics import ReleaseStatistics

PLAN = "plan.json"  # in the work folder: cut once, so that a killed conversion goes on


@dataclass
class Result:
    """What became of a release.

    Attributes:
        num_rows: converted pairs.
        num_rejects: lines that were not converted; they are all in the rejects file.
        shards: entries of the manifest.
        statistics: of the converted pairs.
        problems: what archives could not offer.
    """

    num_rows: int = 0
    num_rejects: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    statistics: ReleaseStatistics = field(default_factory=ReleaseStatistics)
    problems: list[str] = field(default_factory=list)


def convert(options: Options, output: Path, *, workers: int = 1, rejects: Path | None = None) -> Result:
    """Convert a release; the same call goes on after a kill and does nothing where all is done.

    Args:
        options: what to convert and how.
        output: folder for `data/SOURCE/train-*.parquet`, `tiny/` and manifest.json.
        workers: processes.
        rejects: JSONL file for the lines that could not be converted; None is `OUTPUT.rejects.jsonl`.

    Raises:
        BadInputError: no release there, or the output belongs to another one.
    """
    rejects = rejects or output.with_name(f"{output.name}.rejects.jsonl")
    work = output.with_name(f"{output.name}.work")
    subsets = options.subsets()
    fingerprint = _fingerprint(options, subsets)
    finished = _finished(output, fingerprint)
    if finished is not None:
        return finished
    token_counter(options.tokenizer)  # refused before any work
    if work.is_dir() and any(work.iterdir()) and not (work / PLAN).is_file():  # it goes when all is done
        raise BadInputError(f"{work} holds other things than a half-finished conversion; give another --output")
    shards = _load_plan(work, fingerprint, output)
    if shards is None:
        shards = plan(options, subsets, workers)
        _save_plan(work, fingerprint, shards)
    waiting = [shard for shard in shards if not _is_done(work, output, shard)]
    write = partial(write_shard, options=options, output=str(output), work=str(work))
    for _ in progress_bar(
        map_in_processes(write, waiting, workers), total=len(shards), done=len(shards) - len(waiting)
    ):
        pass
    result = _collect(work, output, shards, rejects)
    _write_tiny(work, output, len(subsets), result)
    meta = {subset.name: _published(subset.entry) for subset in subsets}
    manifest = {
        "version": 1,
        "num_rows": result.num_rows,
        "num_rejects": result.num_rejects,
        "shards": result.shards,
        "meta": meta,
        "statistics": result.statistics.to_json(),
        "fingerprint": fingerprint,
    }
    with atomic_writer(output / MANIFEST) as out:
        json.dump(manifest, out, ensure_ascii=False, indent=1)
        out.write("\n")
    shutil.rmtree(work)
    return result


def _published(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of meta.json without paths of the cluster it was written on."""
    paths = {key: relative(entry[key]) for key in ("root", "annotation") if key in entry}
    return {**entry, **paths}


def _fingerprint(options: Options, subsets: Sequence[Subset]) -> str:
    """Hash of the settings, meta.json and annotations: what decides the bytes, pictures apart."""
    facts: list[Any] = [{key: value for key, value in asdict(options).items() if key not in ("raw", "image_root")}]
    for subset in subsets:
        facts.append([subset.name, dict(subset.entry), _content_mark(subset.annotation)])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _content_mark(text: Annotation) -> Any:
    if isinstance(text, Member):
        return text.entry.crc
    return file_facts(text)["sha256"] if isinstance(text, Path) else text.version


def _finished(output: Path, fingerprint: str) -> Result | None:
    """What a finished run of the same conversion left, or None."""
    if not (output / MANIFEST).is_file():
        return None
    manifest = read_manifest(output)
    if manifest.get("fingerprint") != fingerprint:
        raise BadInputError(f"{output} was made from another release or with other settings; give another --output")
    for shard in manifest["shards"]:
        path = output / shard["path"]
        if not path.is_file() or path.stat().st_size != shard["num_bytes"]:
            return None
    statistics = ReleaseStatistics.from_json(manifest["statistics"])
    return Result(manifest["num_rows"], manifest["num_rejects"], manifest["shards"], statistics)


def _save_plan(work: Path, fingerprint: str, shards: Sequence[Shard]) -> None:
    with atomic_writer(work / PLAN) as out:
        json.dump({"fingerprint": fingerprint, "shards": [asdict(shard) for shard in shards]}, out)


def _load_plan(work: Path, fingerprint: str, output: Path) -> list[Shard] | None:
    path = work / PLAN
    if not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["fingerprint"] != fingerprint:
        raise BadInputError(
            f"{work} holds a half-finished conversion of another release or with other settings; "
            f"finish that, or delete {work} and {output}"
        )
    return [Shard(**{**shard, "pieces": [Piece(**piece) for piece in shard["pieces"]]}) for shard in saved["shards"]]


def _is_done(work: Path, output: Path, shard: Shard) -> bool:
    mark = done_mark(work, shard)
    if not mark.is_file():
        return False
    entry = json.loads(mark.read_text(encoding="utf-8"))["shard"]
    path = output / shard.path
    return entry is None or (path.is_file() and path.stat().st_size == entry["num_bytes"])


def _collect(work: Path, output: Path, shards: Sequence[Shard], rejects: Path) -> Result:
    result = Result()
    problems: set[str] = set()
    with atomic_writer(rejects) as out:
        for shard in shards:
            mark = done_mark(work, shard)
            done = json.loads(mark.read_text(encoding="utf-8"))
            if done["shard"] is not None:
                result.shards.append(done["shard"])
                result.num_rows += done["shard"]["num_rows"]
            result.num_rejects += done["num_rejects"]
            result.statistics.merge(ReleaseStatistics.from_json(done["statistics"]))
            problems.update(done["problems"])
            with open(mark.with_suffix(".rejects.jsonl"), encoding="utf-8") as lines:
                shutil.copyfileobj(lines, out)
    if not result.num_rejects:
        rejects.unlink()
    result.problems = sorted(problems)
    return result


def _write_tiny(work: Path, output: Path, num_subsets: int, result: Result) -> None:
    """Join the first rows of every subset to the file of the configuration `tiny`."""
    import pyarrow.parquet as pq

    paths = [path for number in range(num_subsets) if (path := work / f"tiny-{number:05d}.parquet").is_file()]
    if not paths:
        return
    target = output / "tiny" / "train-00000-of-00001.parquet"
    with atomic_path(target) as part, ShardWriter(part, arrow_schema()) as writer:
        for path in paths:
            for row in pq.read_table(path).to_pylist():
                writer.add(row)
    result.shards.append(
        {"path": str(target.relative_to(output)), "source": "tiny", "num_rows": writer.num_rows, **file_facts(target)}
    )
