"""`publish space`: the demo with exactly the files and packages it needs, started in a clean environment first."""

import ast
import importlib.metadata
import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import replaced_folder
from internvl_mpo.programs import HOME, PACKAGES
from internvl_mpo.publish.hygiene import check_nothing_private
from internvl_mpo.publish.settings import Built, HubSettings
from internvl_mpo.publish.space_start import try_out
from internvl_mpo.settings import setting

APP, DEFAULTS, REQUIREMENTS = "app.py", "app.yaml", "requirements.txt"
OURS = ("internvl_mpo", "modeling_internvl_mpo")
_DATA = {".css", ".js", ".html", ".jinja", ".json", ".svg", ".png"}  # what modules read from beside themselves
# Needed though nothing may import them by name: transformers asks for them, the Space runs on Gradio.
_ALWAYS = ("gradio", "accelerate", "safetensors", "tokenizers", "sentencepiece", "jinja2")


@dataclass(kw_only=True)
class SpaceSettings(HubSettings):
    """Settings of `publish space`."""

    output: str = setting(help="folder to build")
    source: str = setting(str(HOME), help="folder with app.py; may be given without --source")
    base: str = setting(help="Hub id of the model before MPO")
    mpo: str | None = setting(None, help="Hub id of the model after MPO")
    adapter: str | None = setting(None, help="Hub id of a LoRA adapter on --base, instead of --mpo")
    four_bit: bool = setting(False, help="load weights in 4 bits")
    votes_repo: str | None = setting(None, help="data set repository on the Hub that votes are uploaded to")
    title: str | None = setting(None, help="of the Space; none = the name of --base, before and after MPO")
    license: str = setting("mit", help="licence identifier")
    hardware: str | None = setting(None, help="hardware to suggest, such as zero-a10g or l4x1")
    environment: Literal["clean", "borrowed"] = setting(
        "clean",
        help="where it is started: clean (a new virtual environment, requirements.txt installed), or borrowed (a new "
        "one with the packages of this one: seconds, but a missing requirement goes unnoticed)",
    )
    skip_start: bool = setting(False, help="do not start it; refused together with --push")
    ask: bool = setting(False, help="also ask the started app a question, which loads both models")
    timeout: float = setting(300.0, help="seconds until the page has to be there, and an answer")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.title = self.title or f"{self.base.split('/')[-1]} before and after MPO"
        if (self.mpo is None) == (self.adapter is None):
            raise BadInputError("give --mpo OWNER/NAME, or --adapter OWNER/NAME")
        for name in filter(None, (self.base, self.mpo, self.adapter, self.votes_repo)):
            if name.count("/") != 1 or name.startswith((".", "/")):
                raise BadInputError(f"'{name}' is no Hub id; a Space reads its models from the Hub, as OWNER/NAME")
        if self.skip_start and self.push and not self.dry_run:
            raise BadInputError("a Space that was not started is not pushed; leave --skip_start or --push out")


def publish_space(settings: SpaceSettings) -> Built:
    """Build the folder, and start it in an environment of its own.

    Raises:
        BadInputError: no app there, a package whose version is not known, or it does not start.
    """
    source = Path(settings.source)
    if not (source / APP).is_file():
        raise BadInputError(f"{source} holds no {APP}; give a checkout of MPO for InternVL, or leave --source out")
    with replaced_folder(settings.output, sources=[source]) as folder:
        library = source if (source / OURS[0]).is_dir() else PACKAGES
        modules, packages = needed_by(source / APP, library)
        for path in modules:
            target = folder / path.relative_to(source if path.is_relative_to(source) else library)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        pins = pin({*packages, *_ALWAYS} | ({"bitsandbytes"} if settings.four_bit else set()))
        (folder / REQUIREMENTS).write_text("".join(f"{line}\n" for line in pins), encoding="utf-8")
        (folder / DEFAULTS).write_text(yaml.safe_dump(_defaults(settings), sort_keys=False), encoding="utf-8")
        (folder / "README.md").write_text(_card(settings, dict(line.split("==") for line in pins)), encoding="utf-8")
        if (source / "LICENSE").exists():
            shutil.copyfile(source / "LICENSE", folder / "LICENSE")
        check_nothing_private(folder, owner=settings.owner)
        if not settings.skip_start:
            print(
                try_out(folder, clean=settings.environment == "clean", ask=settings.ask, timeout=settings.timeout),
                flush=True,
            )
    return Built(Path(settings.output))


def needed_by(app: Path, library: Path) -> tuple[list[Path], set[str]]:
    """Follow the imports of a program.

    Args:
        app: the program.
        library: the folder in which our packages lie: beside the program in a checkout, around it in a wheel.

    Returns:
        Our files (styles, templates and pictures beside a package's modules included), and the other top-level modules
        they import and that are installed here. Modules that are not installed are optional by the way they are
        imported.
    """
    seen, waiting, others = {app}, [app], set()
    while waiting:
        for name in _imports(waiting.pop(), library):
            top = name.split(".")[0]
            if top not in OURS:
                if top not in sys.stdlib_module_names and importlib.util.find_spec(top) is not None:
                    others.add(top)
                continue
            for path in _files(library, name):
                if path not in seen:
                    seen.add(path)
                    waiting.append(path)
    folders = {path.parent for path in seen - {app}} - {library}
    beside = {path for folder in folders for path in folder.iterdir() if path.is_file()}
    data = {path for path in beside if path.suffix in _DATA and not path.name.startswith(".")}
    return sorted(seen | data), others


def pin(modules: set[str]) -> list[str]:
    """Return `name==version` of the installed packages that bring these modules.

    Raises:
        BadInputError: a module belongs to no installed package.
    """
    owners = importlib.metadata.packages_distributions()
    lines = set()
    for module in modules:
        names = owners.get(module) or [module]
        try:
            version = importlib.metadata.version(names[0])
        except importlib.metadata.PackageNotFoundError as error:
            raise BadInputError(f"the version of '{module}' is not known here; pip install it first") from error
        lines.add(f"{names[0].lower()}=={version.split('+')[0]}")  # 2.13.0+cpu is a build that PyPI does not have
    return sorted(lines)


def _imports(path: Path, root: Path) -> Iterator[str]:
    """Dotted names a file imports, also inside functions; of `from a import b` both `a` and `a.b`."""
    package = ".".join(path.relative_to(root).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module if node.level == 0 else f"{package}.{node.module}"
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _files(root: Path, name: str) -> Iterator[Path]:
    """Files of a module of ours: itself and the packages around it; none if it is a name inside a module."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = root.joinpath(*parts[:end])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                yield candidate


def _defaults(settings: SpaceSettings) -> dict[str, Any]:
    names = ("base", "mpo", "adapter", "four_bit", "votes_repo")
    return {name: value for name in names if (value := getattr(settings, name))} | {"host": "0.0.0.0", "port": 7860}


def _card(settings: SpaceSettings, versions: dict[str, str]) -> str:
    from huggingface_hub import SpaceCardData

    models = [name for name in (settings.base, settings.mpo, settings.adapter) if name]
    header = SpaceCardData(
        title=settings.title,
        emoji="🔢",
        colorFrom="blue",
        colorTo="green",
        sdk="gradio",
        sdk_version=versions["gradio"],
        python_version=".".join(platform.python_version_tuple()[:2]),
        app_file=APP,
        license=settings.license,
        models=list(models),
        datasets=[settings.votes_repo] if settings.votes_repo else None,
        suggested_hardware=settings.hardware,
        short_description="Ask both about your picture, side by side",
        preload_from_hub=list(models),  # equal lists of one object would become YAML anchors
    )
    links = " and ".join(f"[{name}](https://huggingface.co/{name})" for name in models)
    stored = "A vote stores the question, both answers and the picture"
    if settings.votes_repo:
        stored += f", and adds them to [{settings.votes_repo}](https://huggingface.co/datasets/{settings.votes_repo})"
    return _TEXT.format(header=header.to_yaml(), title=settings.title, links=links, stored=stored)


_TEXT = """\
---
{header}
---

# {title}

Ask about a picture and watch two models answer side by side, with their reasoning: {links}.

Settings are in `app.yaml`; every flag of `python app.py --help` can stand there.

Uploads stay in a temporary folder of the Space and go with it. {stored}.
"""
