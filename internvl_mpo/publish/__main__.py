"""Builds the exact folders that go to the Hub; pushing one is the last step.

python -m internvl_mpo.publish model InternVL2-2B/ --output outputs/InternVL2-2B
    puts this project's code, a fast tokenizer, a processor and a chat template beside the weights of an official (or
    fine-tuned) InternVL folder. The weights are linked, not rewritten.
"""

import sys
from dataclasses import dataclass

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.publish.hub import push_folder
from internvl_mpo.publish.model_folder import build_model_folder
from internvl_mpo.settings import parse_settings, setting, show_settings


@dataclass
class Settings:
    """Settings of `publish`."""

    source: str = setting(help="folder to publish; may be given without --source")
    output: str = setting(help="folder to build")
    push: str | None = setting(None, help="Hub repository to upload to, as owner/name")
    private: bool = setting(False, help="make the repository private if it has to be created")


BUILDERS = {"model": build_model_folder}


def main(argv: list[str]) -> int:
    """Build a folder, and push it if asked to."""
    kind = argv[0] if argv else None
    if kind in (None, "-h", "--help"):
        kinds = ",".join(BUILDERS)
        print(f"{__doc__}\nusage: python -m internvl_mpo.publish {{{kinds}}} SOURCE --output DIR [--push REPO]")
        return 0 if kind else 2
    if kind not in BUILDERS:
        raise BadInputError(f"'{kind}' cannot be published; expected one of {', '.join(BUILDERS)}")
    rest = argv[1:]
    if rest and not rest[0].startswith("-"):
        rest = ["--source", *rest]
    settings = parse_settings(Settings, rest, program=f"-m internvl_mpo.publish {kind}", about=__doc__)
    print(show_settings(settings, f"publish {kind}"))
    folder = BUILDERS[kind](settings.source, settings.output)
    print(f"built {folder}")
    if settings.push:
        print(f"pushed to {push_folder(folder, settings.push, repo_type=kind, private=settings.private)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
