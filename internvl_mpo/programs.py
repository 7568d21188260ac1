"""Programs and run files: where they lie, and what a user types to start them.

In a checkout they lie beside the package (`python train_mpo.py`). An installed wheel carries them inside, in
`internvl_mpo/checkout`, and one console command starts them (`internvl-mpo train`); `setup.py` puts them there.
"""

import re
import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
PACKAGES = _PACKAGE.parent  # the folder in which our packages lie
INSTALLED = (_PACKAGE / "checkout").is_dir()
HOME = _PACKAGE / "checkout" if INSTALLED else PACKAGES

# name of the command -> (program below HOME, or a module of the package after -m; what it does)
COMMANDS = {
    "quickstart": ("-m internvl_mpo.quickstart", "the whole path on handwritten digits: no GPU, nothing to download"),
    "train": ("train_mpo.py", "train with Mixed Preference Optimization"),
    "evaluate": ("evaluate_mpo.py", "answer the questions of benchmarks, then score; also `compare` and `card`"),
    "demo": ("app.py", "base and MPO side by side in a browser"),
    "sample": ("dataset_scripts/sample_responses.py", "sample responses to questions"),
    "pairs": ("dataset_scripts/build_correctness_pairs.py", "responses -> preference pairs, right over wrong"),
    "ntp-pairs": ("dataset_scripts/build_dropout_ntp_pairs.py", "responses -> preference pairs by Dropout-NTP"),
    "judged-pairs": ("dataset_scripts/build_judged_pairs.py", "responses -> preference pairs, by a judge's ratings"),
    "verify": ("dataset_scripts/verify_pairs.py", "keep the pairs a judge agrees with"),
    "rounds": ("-m internvl_mpo.rounds", "sample, judge, pair, train and evaluate in rounds"),
    "check": ("dataset_scripts/check_mmpr.py", "what is wrong with preference data, and benchmark questions in it"),
    "convert": ("dataset_scripts/convert_mmpr.py", "an MMPR release -> Parquet, and back"),
    "convert-model": ("-m internvl_mpo.convert", "a checkpoint, official layout <-> HF-native layout"),
    "publish": ("-m internvl_mpo.publish", "a model, a data set or the demo to the Hub, proved first"),
    "serve": ("-m internvl_mpo.engines.serve", "a model as a chat server"),
    "with-server": ("-m internvl_mpo.engines.with_server", "run a program beside servers of a model, any server"),
    "memory": ("-m internvl_mpo.memory_estimate", "GPU memory of a training run, before a GPU is rented"),
    "replay": ("-m internvl_mpo.replay", "repeat a training step that was not finite"),
    "mini": ("-m internvl_mpo.mini", "the small world of handwritten digits, its start model, its MMPR release"),
    "ablation": ("runs/ablation.py", "compare methods over seeds and settings in that world, with intervals"),
}


def program(name: str) -> list[str]:
    """Return the words that start a program, named as in `COMMANDS`' values, in this interpreter."""
    return [sys.executable, *(name.split() if name.startswith("-m ") else [str(HOME / name)])]


def spelled(text: str) -> str:
    """Return a text that tells what to type, as it is typed here: an installed wheel has no `python train_mpo.py`."""
    if not INSTALLED:
        return text
    for name, (started, _) in COMMANDS.items():
        text = re.sub(rf"\bpython {re.escape(started)}(?![\w.])", f"internvl-mpo {name}", text)
        text = re.sub(rf"(\btorchrun\b[^\n]*? ){re.escape(started)}", rf"\1-m internvl_mpo {name}", text)
    return text


def run_file(path: str | Path) -> Path:
    """Return the place of a run file; `configs/internvl2_8b.yaml` is found whatever the working directory is.

    A file of the working directory comes first; a path that is nowhere stays as it is.
    """
    return HOME / path if not Path(path).exists() and (HOME / path).is_file() else Path(path)


def way_to(path: str) -> str:
    """Say how a user gets a file or folder that is not there."""
    return "`make quickstart` makes it" if path.startswith("outputs/mini/") else "give its path"
