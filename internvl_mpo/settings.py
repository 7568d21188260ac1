"""Settings of the programs: a dataclass, a YAML file, overrides on the command line.

A program declares one dataclass; every field has a type, a default (or none, which makes it required) and a help text:

    @dataclass
    class Settings:
        model: str = setting(help="folder or Hub id of the model that answers")
        num_samples: int = setting(8, help="responses per question")

    settings = parse_settings(Settings, argv, program="sample_responses.py", about=__doc__)

`--config FILE.yaml` gives values, `--key value` overrides them. Unknown keys, missing keys and wrong types are refused
with the key, the value and what was expected, before anything else happens.
"""

import argparse
import dataclasses
import difflib
import enum
import itertools
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.programs import run_file, spelled

T = TypeVar("T")

_OWN = "internvl_mpo"  # marks the fields a program declares itself, apart from those it inherits
MAX_CONFIG_DEPTH = 100  # brackets, or dashes of lists in lists; the reader would take minutes for many more
MAX_CONFIG_VALUES = 100_000  # of a config file, aliases counted as often as they are used
# user:password@host of a URL; the second form is a password with a slash in it, which may begin like a port: 123/45
_PASSWORD = re.compile(r"//[^/?#\s]*@|//[^/?#\s:]+:\S*@")


def setting(default: Any = dataclasses.MISSING, *, help: str) -> Any:
    """Return a dataclass field with a help text; mutable defaults are copied for each instance."""
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=_own(help))
    return dataclasses.field(default=default, metadata=_own(help))


def parse_settings(cls: type[T], argv: Sequence[str], *, program: str, about: str, config: bool = True) -> T:
    """Read `cls` from `--config` and `--key value` pairs.

    Args:
        cls: the settings dataclass; values it refuses itself in `__post_init__` should raise `BadInputError`.
        argv: command-line arguments without the program name. Empty prints how to use the program and exits with 2.
        program: file name for the usage line.
        about: text of `--help`; its first paragraph says what the program does, an example follows.
        config: whether `--config` is offered.

    Returns:
        An instance of `cls`.

    Raises:
        BadInputError: unknown key, missing key, wrong type, unreadable YAML.
    """
    fields = _fields(cls)
    parser = argparse.ArgumentParser(
        prog=spelled(f"python {program}"),
        usage=spelled(f"python {program} {'[--config FILE.yaml] ' if config else ''}[--key value ...]"),
        description=spelled(about),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    if config:
        parser.add_argument("--config", metavar="FILE.yaml", help="settings file; options given beside it win")
    for name, field in fields.items():
        if field.metadata.get(_OWN):
            parser.add_argument(f"--{name}", metavar="VALUE", help=_help(field), nargs="?", const="true")
    if not argv:
        parser.print_help(sys.stderr)
        raise SystemExit(2)
    known, rest = parser.parse_known_args([_underscored(word) for word in argv])
    given = dict(vars(known))
    values: dict[str, Any] = {}
    path = given.pop("config", None) if config else None  # without it, "config" may be a setting of the program
    if path is not None:
        values.update(read_yaml(path))
    values.update(given)
    values.update(_overrides(rest))
    return build_settings(cls, values, where=f"{path or 'command line'}")


def build_settings(cls: type[T], values: Mapping[str, Any], *, where: str = "settings") -> T:
    """Check `values` against the fields of `cls` and return an instance; see `parse_settings`."""
    fields = _fields(cls)
    check_keys(values, {name: _required(field) for name, field in fields.items()}, where)
    hints = typing.get_type_hints(cls)
    return cls(**{key: coerce(value, hints[key], key, where) for key, value in values.items()})


def check_keys(values: Mapping[str, Any], keys: Mapping[str, bool], where: str) -> None:
    """Refuse values whose keys do not fit.

    Args:
        values: what is given.
        keys: the names of all settings and whether they must be given.
        where: who gives them, for messages.

    Raises:
        BadInputError: naming a key that is unknown, or those that are missing.
    """
    unknown = [key for key in values if key not in keys]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0])[:80], keys, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else "; --help lists the keys"
        raise BadInputError(f"unknown setting {quoted(unknown[0])} ({where}){hint}")
    missing = [name for name, required in keys.items() if required and values.get(name) is None]
    if missing:
        names = ", ".join(f"'{name}'" for name in missing)
        raise BadInputError(
            f"missing setting {names} ({where}); give --{missing[0]} VALUE or add it to the config file"
        )


def given_values(argv: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Return the values of `--config` and `--key value` as they stand, and who gives them, for messages.

    Raises:
        BadInputError: the config file cannot be read.
    """
    given = _overrides([_underscored(word) for word in argv])
    path = given.pop("config", None)
    where = " and the ".join(filter(None, (path, "command line" if given or path is None else None)))
    return {**(read_yaml(path) if path is not None else {}), **given}, where


def coerce(value: Any, hint: Any, key: str, where: str) -> Any:
    """Return `value` as type `hint`; command-line text is read as the type asked for, nothing else is guessed.

    `none`, `null` and an empty text mean None where None is allowed and no other choice is spelled that way.
    """
    if holds_password(value, is_url=key.endswith("url")):
        raise BadInputError(
            f"setting '{key}' ({where}) holds a password in its address, which would be shown and saved; take it out "
            "and give the key in the environment variable that --api_key_env names; an '@' of the path is written %40"
        )
    options = _union(hint)
    choices = [option for option in options if option is not type(None)]
    nothing = value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))
    if nothing and type(None) in options and not any(_convert(value, c)[1] for c in choices if c is not str):
        return None
    for choice in choices:
        converted, ok = _convert(value, choice)
        if ok and not (nothing and choice is str):
            return converted
    raise BadInputError(f"setting '{key}' is {quoted(value)} ({where}); expected {_spell(hint)}")


def holds_password(value: Any, *, is_url: bool = False) -> bool:
    """Tell whether a text, or one of a list of texts, is an address with user and password before its host.

    Args:
        value: of a setting.
        is_url: it is an address of a server, however it is spelled; an `@` belongs to no such address without a user.
    """
    if isinstance(value, (list, tuple)):
        return any(holds_password(item, is_url=is_url) for item in value)
    if not isinstance(value, str):
        return False
    return "@" in value if is_url else bool(_PASSWORD.search(value))


def quoted(value: Any) -> str:
    """Return a value as a message quotes it: `repr`, cut in the middle where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    try:
        return short.repr(value)
    except ValueError:  # Python writes no number of over 4,300 digits
        return (
            f"a number of {value.bit_length() * 3 // 10:,} digits" if isinstance(value, int) else type(value).__name__
        )


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, which `run_file` finds.

    Raises:
        BadInputError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        text = run_file(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInputError(f"cannot read config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    try:
        loaded = parse_yaml(text) or {}
    except BadInputError as error:
        raise BadInputError(f"{path}{error}") from error
    if not isinstance(loaded, dict):
        raise BadInputError(f"{path} must hold 'key: value' lines, found a {type(loaded).__name__}")
    return loaded


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping, of which YAML would silently take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key '{key.value[:80]}' stands there twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return node


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds.

    Raises:
        BadInputError: the text is not YAML, names a key twice, or is too deep or too large; the message goes on after
            the name of a file.
    """
    try:
        if _bracket_depth(text) > MAX_CONFIG_DEPTH or "- " * MAX_CONFIG_DEPTH in text:
            raise RecursionError
        loaded = yaml.load(text, _Loader)  # a SafeLoader
        if _num_values(loaded, {}) > MAX_CONFIG_VALUES:
            raise BadInputError(f" holds over {MAX_CONFIG_VALUES:,} values with its aliases; write what is needed")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise BadInputError(f"{line} is not valid YAML: {problem}") from error
    except RecursionError as error:
        raise BadInputError(" is nested too deep, or within itself; settings are 'key: value' lines") from error
    except ValueError as error:  # a number of over 4,300 digits, the 31st of June
        if isinstance(error, BadInputError):
            raise
        raise BadInputError(f" is not valid YAML: {str(error).partition(';')[0]}") from error
    return loaded


def _bracket_depth(text: str) -> int:
    steps = (1 if bracket in "[{" else -1 for bracket in re.findall(r"[\[\]{}]", text))
    return max(itertools.accumulate(steps), default=0)


def _num_values(value: Any, known: dict[int, int]) -> int:
    """Values inside a value, those of an alias every time it is used; RecursionError where it holds itself."""
    if not isinstance(value, (list, dict)):
        return 1
    if known.get(id(value)) == 0:
        raise RecursionError
    if id(value) not in known:
        known[id(value)] = 0
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_num_values(part, known) for part in parts)
    return known[id(value)]


def write_settings(settings: Any, path: str | Path, leave_out: Collection[str] = ()) -> None:
    """Save a settings dataclass as YAML, whole or not at all, so that the run can be repeated with `--config`.

    Args:
        settings: the dataclass.
        path: the file; its folder is made.
        leave_out: fields that the program found itself and would not take from a user.
    """
    # A token works from the environment again, and a saved one ends up where it should not be.
    names = [name for name in _fields(type(settings)) if not _is_secret(name) and name not in leave_out]
    values = {name: plain(getattr(settings, name)) for name in names}
    with atomic_writer(path) as out:
        yaml.safe_dump(values, out, sort_keys=False, allow_unicode=True)


def show_settings(settings: Any, title: str, *, only_changed: bool = False) -> str:
    """Return a printable table of the resolved settings, `key  value` per line.

    Inherited fields (transformers has some 120 of them) appear where they differ from their default; with
    `only_changed` the program's own as well.
    """
    rows = [
        (name, "(not shown)" if _is_secret(name) and getattr(settings, name) else plain(getattr(settings, name)))
        for name, field in _fields(type(settings)).items()
        if (field.metadata.get(_OWN) and not only_changed) or plain(getattr(settings, name)) != plain(_default(field))
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join([title] + [f"  {name:<{width}}  {'-' if value is None else value}" for name, value in rows])


def plain(value: Any) -> Any:
    """Return a setting as YAML and JSON hold it, so that it can be read back."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value):  # transformers makes one of the dict it is given for accelerator_config
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _is_secret(name: str) -> bool:
    return name.endswith("hub_token")  # two fields of transformers' TrainingArguments


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def _own(help_text: str) -> dict[str, Any]:
    return {"help": help_text, _OWN: True}


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _help(field: dataclasses.Field) -> str:
    text = field.metadata["help"].replace("%", "%%")
    if _required(field):
        return f"{text} (required)"
    default = _default(field)
    return f"{text} (default: {'-' if default in (None, '', [], {}) else default})"


def _underscored(word: str) -> str:
    """`--dry-run` is `--dry_run`; values stay as they are."""
    key, equals, value = word.partition("=")
    return key[:2] + key[2:].replace("-", "_") + equals + value if key.startswith("--") else word


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    """`--key value` and `--key=value` pairs that have no help text of their own; their names are checked later."""
    values: dict[str, str] = {}
    position = 0
    while position < len(rest):
        word = rest[position]
        if not word.startswith("--"):
            shown = "with an '@', which may end a password" if holds_password(word, is_url=True) else quoted(word)
            raise BadInputError(f"unexpected argument {shown}; settings are given as --key value, lists as --key a,b")
        key, equals, value = word[2:].partition("=")
        if not equals:
            following = rest[position + 1] if position + 1 < len(rest) else None
            if following is None or following.startswith("--"):
                value = "true"
            else:
                value = following
                position += 1
        values[key] = value
        position += 1
    return values


def _union(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(part for option in typing.get_args(hint) for part in _union(option))
    return (hint,)


def _convert(value: Any, hint: Any) -> tuple[Any, bool]:
    """One type at a time: (converted value, True) or (None, False)."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return value, True
    if origin is Literal:
        choices = {str(choice): choice for choice in typing.get_args(hint)}
        return choices.get(str(value)), str(value) in choices
    if origin in (list, tuple, Sequence, dict) or hint in (list, tuple, dict):
        return _convert_collection(value, hint, origin or hint)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        members = {str(member.value): member for member in hint}
        return members.get(str(value)), str(value) in members
    if hint is bool:
        words = {"true": True, "yes": True, "false": False, "no": False, "1": True, "0": False}
        if isinstance(value, bool):
            return value, True
        return words.get(str(value).lower()), isinstance(value, str) and value.lower() in words
    if hint in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            return None, False
        if hint is int and isinstance(value, int):
            return (value, True) if abs(value) < 2**63 else (None, False)
        try:  # YAML reads 5e-6 as a string; float() takes both spellings
            number = float(value)
        except (ValueError, OverflowError):
            return None, False
        if hint is int:
            return (int(number), True) if number.is_integer() else (None, False)
        return number, True
    if hint is str:
        return (str(value), True) if isinstance(value, (str, int, float, os.PathLike)) else (None, False)
    if isinstance(hint, type) and isinstance(value, hint):
        return value, True
    return None, False


def _convert_collection(value: Any, hint: Any, kind: Any) -> tuple[Any, bool]:
    if isinstance(value, str):
        if kind is dict or value.lstrip().startswith(("[", "{")):
            try:
                value = parse_yaml(value)
            except BadInputError:
                return None, False
        else:
            value = [part.strip() for part in value.split(",") if part.strip()]
    if kind is dict:
        return (value, True) if isinstance(value, dict) else (None, False)
    if not isinstance(value, (list, tuple)):
        return None, False
    inner = (typing.get_args(hint) or (Any,))[0]
    items = [next((c for c, ok in (_convert(item, o) for o in _union(inner)) if ok), None) for item in value]
    if any(item is None for item in items):
        return None, False
    return (tuple(items) if kind is tuple else items), True


def _spell(hint: Any) -> str:
    """A type as a user would say it."""
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "nothing"}
    spelled = []
    for option in _union(hint):
        origin = typing.get_origin(option)
        if origin is Literal:
            spelled.append("one of " + ", ".join(str(choice) for choice in typing.get_args(option)))
        elif origin in (list, tuple, Sequence) or option in (list, tuple):
            item = _spell((typing.get_args(option) or (Any,))[0])
            spelled.append(f"{item}, or several with commas between them" if item.startswith("one of") else "a list")
        elif isinstance(option, type) and issubclass(option, enum.Enum):
            spelled.append("one of " + ", ".join(str(member.value) for member in option))
        else:
            spelled.append(names.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(spelled)
