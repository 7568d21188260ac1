"""MMPR on disk: raw releases, Parquet, checks, cards.

reading       pairs out of any source: begin here
sources       the same in blocks, for several processes
pairs         one pair with its pictures at hand; how often a pass repeats it
release, files, archives, joined_parts    the raw layout: meta.json, JSONL, pictures in zip files, whole or in parts
lines, tables, row_groups    rows of text files and of Parquet made elsewhere, one by one
parquet, convert, shard_plan, shard_writer, manifest, restore    the Parquet form, and the way there and back
check, findings, copies, contamination, check_report    what is wrong with a release
statistics, card    what is in it
"""

from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.reading import iter_pairs

__all__ = ["PairRow", "iter_pairs"]
