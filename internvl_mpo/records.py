"""The rows that move between programs: Question -> Response -> PreferencePair, and the JSONL files they live in.

On disk a row is one JSON object per line in MMPR's own form, so that official annotation files are read as they are:

    {"image": "a.png", "question": "...", "chosen": "...", "rejected": "...", "answer_gt": "12", "id": "9c0e...", ...}

`image` is a string, a list of strings, or absent (a text-only row). Our files add `id`, `source`, `rule` and
`provenance`; readers of MMPR ignore them. A conversation adds `system` and `history`, its earlier turns as
[question, answer]. Of `image` and `images`, `answer_gt` and `answer` the one that holds something counts.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, TypeVar

from internvl_mpo.errors import RowError
from internvl_mpo.jsonl import iter_jsonl, write_jsonl
from internvl_mpo.row_keys import holds, place_of_media, why_refused

IMAGE_PLACEHOLDER = "<image>"  # stands in a question for its next picture, as in MMPR
_SHARED_KEYS = frozenset(
    ("id", "image", "images", "question", "answer", "answer_gt", "system", "history", "source", "provenance")
)
RULES = ("correctness", "format", "direct", "dropout_ntp", "prefix_with_image", "vote", "judged", "other")


_CANONICAL = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))
_PLAIN = json.JSONEncoder(ensure_ascii=False)
_TEXT = frozenset((str, type(None)))
json_quoted = json.encoder.encode_basestring
_quoted = lru_cache(maxsize=4096)(json_quoted)  # a question and a response stand in many pairs


def to_json_text(value: Any) -> str:
    """Return `json.dumps(value, ensure_ascii=False)`; texts are kept, as one stands in many rows."""
    kind = type(value)
    if kind is str:
        return _quoted(value)
    if kind is int:
        return repr(value)
    if kind in (list, tuple) and all(type(text) is str for text in value):
        return f"[{', '.join(map(_quoted, value))}]"
    return "null" if value is None else _PLAIN.encode(value)


def content_id(*parts: Any) -> str:
    """Return a stable 16-digit hexadecimal id of JSON-able parts; equal parts give equal ids on every machine."""
    text = ",".join([_quoted(part) if type(part) is str else _canonical(part) for part in parts])
    return hashlib.sha256(f"[{text}]".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _canonical(part: Any) -> str:
    kind = type(part)
    if kind is str:
        return _quoted(part)
    if kind in (list, tuple) and _TEXT.issuperset(map(type, part)):
        return f"[{','.join(['null' if text is None else _quoted(text) for text in part])}]"
    return "null" if part is None else _CANONICAL.encode(part)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the three kinds of row share: pictures, a question, and where it came from.

    Attributes:
        images: paths relative to an image root, in the order of the question's `<image>` placeholders; may be empty.
        question: the user's text as the model reads it; a single-image question may leave `<image>` out.
        answer: ground truth, or None where there is none; several of which one is enough are a JSON list of texts.
        system: replaces the system message of the chat template; None keeps it.
        history: earlier turns, (question, answer) pairs; their questions may hold placeholders as well.
        source: name of the data set the question comes from.
        provenance: how the row was made (model, revision, sampler settings, seed, ...).
        id: hash of the content unless given.
    """

    images: tuple[str, ...] = ()
    question: str
    answer: str | None = None
    system: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    source: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""

    _text_keys: ClassVar[tuple[str, ...]] = ()
    _required: ClassVar[tuple[str, ...]] = ("question",)
    _keys: ClassVar[frozenset[str]] = _SHARED_KEYS | {"chosen", "rejected", "response", "rule", "question_id"}

    def __post_init__(self) -> None:
        if type(self.images) is not tuple:
            object.__setattr__(self, "images", tuple(self.images))
        if _is_blank(self.question):
            raise RowError("the question is empty")
        if not self.id:
            texts = [getattr(self, key) for key in self._text_keys]
            key = content_id(self.images, self.question, self.answer, *texts, *self.context)
            object.__setattr__(self, "id", key)

    @property
    def context(self) -> tuple[Any, ...]:
        """What stands before the question, system message and earlier turns; empty where there is nothing."""
        return ((self.system, self.history),) if self.system is not None or self.history else ()

    @classmethod
    def from_json(cls, row: Mapping[str, Any], *, source: str = "", where: str = "") -> Self:
        """Build the row from a JSON object.

        Args:
            row: keys as on disk; notes are kept under `provenance`, see `row_keys`.
            source: used where the row names none.
            where: `file:line` for messages.

        Raises:
            RowError: a key is missing, has the wrong type, or holds what is not read; the message starts with `where`.
        """
        try:
            values: dict[str, Any] = {
                "source": row.get("source") or source,
                "images": images_of(row),
                "answer": truth_of(row),
                "system": _system(row) if "system" in row else None,
                "history": _history(row) if "history" in row else (),
                "id": str(row.get("id") or ""),
                "provenance": _provenance(row, cls._keys),
            }
            for key in cls._required:
                value = values[key] = row.get(key)
                if type(value) is not str:
                    _refuse(row, key)
            for text in (values["question"], *(asked for asked, _ in values["history"])):
                if place_of_media(text):
                    raise RowError(f"the question has a place for {place_of_media(text)}, which is not read")
            if row.get("rule") and "rule" in cls.__dataclass_fields__:
                values["rule"] = row["rule"]
                if type(row["rule"]) is not str:
                    _refuse(row, "rule")
            built = cls.of_fields(values)  # cls(**values) goes through object.__setattr__ for every field
            built.__post_init__()
            return built
        except RowError as error:
            raise RowError(error.reason, where) from error

    @classmethod
    def of_fields(cls, values: dict[str, Any]) -> Self:
        """Return the row whose `vars` these are; they are neither checked nor copied."""
        built = cls.__new__(cls)
        object.__setattr__(built, "__dict__", values)
        return built

    def to_line(self) -> str:
        """Return the row as a line of JSON: `json.dumps(row.to_json(), ensure_ascii=False)`, quicker for many rows."""
        return f"{{{', '.join(f'{_quoted(key)}: {to_json_text(value)}' for key, value in self.to_json().items())}}}\n"

    def to_json(self) -> dict[str, Any]:
        """Return the row as it is written; `from_json` of it gives an equal row."""
        out: dict[str, Any] = {"id": self.id}
        if self.images:
            out["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        out["question"] = self.question
        for key in self._text_keys:
            out[key] = getattr(self, key)
        if self.system is not None:
            out["system"] = self.system
        if self.history:
            out["history"] = [list(turn) for turn in self.history]
        if self.answer is not None:
            out["answer_gt"] = self.answer
        if self.source:
            out["source"] = self.source
        for key in ("rule", "question_id"):
            if getattr(self, key, ""):
                out[key] = getattr(self, key)
        if self.provenance:
            out["provenance"] = dict(self.provenance)
        return out


@dataclass(frozen=True, kw_only=True)
class Question(Row):
    """A question to be answered, with or without a ground truth."""


@dataclass(frozen=True, kw_only=True)
class Response(Row):
    """One answer of one model to one question; `question` is the text as it was asked, prompt style included."""

    question_id: str
    response: str
    _text_keys: ClassVar[tuple[str, ...]] = ("response",)
    _required: ClassVar[tuple[str, ...]] = ("question", "response", "question_id")
    _keys: ClassVar[frozenset[str]] = _SHARED_KEYS | {"response", "rule", "question_id"}

    def __post_init__(self) -> None:
        if not self.id:  # equal texts drawn with different seeds are different samples
            key = content_id(self.question_id, self.question, self.response, dict(self.provenance), *self.context)
            object.__setattr__(self, "id", key)
        super().__post_init__()

    def chosen_over(self, rejected: str, rule: str, provenance: Mapping[str, Any]) -> "PreferencePair":
        """Return the pair in which this response is preferred over another to the same prompt.

        Args:
            rejected: text of the other.
            rule: see `PreferencePair`.
            provenance: of the pair.
        """
        return PreferencePair(
            images=self.images,
            question=self.question,
            chosen=self.response,
            rejected=rejected,
            answer=self.answer,
            system=self.system,
            history=self.history,
            source=self.source,
            rule=rule,
            provenance=provenance,
        )


@dataclass(frozen=True, kw_only=True)
class PreferencePair(Row):
    """One row of MMPR: the chosen response is preferred over the rejected one.

    Attributes:
        rule: why it is preferred, one of `RULES`.
    """

    chosen: str
    rejected: str
    rule: str = "other"
    _text_keys: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    _required: ClassVar[tuple[str, ...]] = ("question", "chosen", "rejected")
    _keys: ClassVar[frozenset[str]] = _SHARED_KEYS | {"chosen", "rejected", "rule", "question_id"}

    def __post_init__(self) -> None:
        for key in ("chosen", "rejected"):
            if _is_blank(getattr(self, key)):
                raise RowError(f"'{key}' is empty")
        if self.chosen == self.rejected:
            raise RowError("'chosen' equals 'rejected', so there is nothing to prefer")
        if self.rule not in RULES:
            raise RowError(f"'rule' is '{self.rule}', expected one of {', '.join(RULES)}")
        super().__post_init__()

    @property
    def group_key(self) -> str:
        """Pairs with the same key share images and prompt."""
        return content_id(self.images, self.question, *self.context)


class PairLines:
    """Makes the lines of pairs of one question as `PreferencePair.to_line` would, from pieces that were encoded once.

    The caller answers for what `PreferencePair` checks: a known rule, two texts that differ, none of them empty.
    """

    def __init__(self, asked: Row):
        """Encode and hash what the pairs share with the row they answer."""
        images, question, answer = asked.images, asked.question, asked.answer
        shared = ",".join(map(_canonical, (images, question, answer)))
        self._hash = hashlib.sha256(f"[{shared},".encode("utf-8", "surrogatepass"))
        image = "" if not images else f', "image": {to_json_text(images[0] if len(images) == 1 else list(images))}'
        self._head = f'{image}, "question": {to_json_text(question)}, "chosen": '
        self._answer = "" if answer is None else f', "answer_gt": {to_json_text(answer)}'
        if asked.history:
            self._answer = f', "history": {to_json_text(asked.history)}{self._answer}'
        if asked.system is not None:
            self._answer = f', "system": {to_json_text(asked.system)}{self._answer}'
        self._context = "".join(f",{_canonical(part)}" for part in asked.context)
        self._ends: dict[tuple[str, str], str] = {}

    def line(self, chosen: str, rejected: str, source: str, rule: str, provenance: str) -> str:
        """Return the line of a pair; both responses and the provenance, not empty, are given as JSON."""
        whole = self._hash.copy()
        whole.update(f"{chosen},{rejected}{self._context}]".encode("utf-8", "surrogatepass"))
        end = self._ends.get((source, rule))
        if end is None:
            named = f', "source": {to_json_text(source)}' if source else ""
            end = self._ends[source, rule] = f'{self._answer}{named}, "rule": "{rule}", "provenance": '
        return f'{{"id": "{whole.hexdigest()[:16]}"{self._head}{chosen}, "rejected": {rejected}{end}{provenance}}}\n'


R = TypeVar("R", bound=Row)


def read_rows(path: str | Path, cls: type[R], *, source: str = "") -> list[R]:
    """Return all rows of a JSONL file; the first bad one raises with file and line."""
    return [cls.from_json(row, source=source, where=where) for where, row in iter_jsonl(path)]


def write_rows(rows: Iterable[Row], path: str | Path) -> int:
    """Write rows as JSONL and return their number; the file appears whole or not at all."""
    return write_jsonl((row.to_json() for row in rows), path)


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _refuse(row: Mapping[str, Any], key: str) -> NoReturn:
    if key not in row:
        raise RowError(f"key '{key}' is missing")
    raise RowError(f"key '{key}' must be text, found {type(row[key]).__name__}")


def images_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    found = [tuple(row[key]) if type(row[key]) is list else (row[key],) for key in _siblings(row, "image", "images")]
    if not found:
        return ()
    for name in found[0]:
        if not isinstance(name, str) or not holds(name):
            raise RowError("key 'image' must be text or a list of texts")
    if found[1:] and found[0] != found[1]:
        raise RowError("keys 'image' and 'images' name different pictures; keep one of them")
    return found[0]


def truth_of(row: Mapping[str, Any]) -> str | None:
    """Return the ground truth of a row in its form on disk; several are a JSON list of texts.

    Raises:
        RowError: it is no text, number or list of them, or `answer_gt` and `answer` differ.
    """
    if "answer_gt" in row and "answer" not in row and type(row["answer_gt"]) is str:
        return row["answer_gt"]
    found = [_truth(key, row[key]) for key in _siblings(row, "answer_gt", "answer")]
    if not found:
        blank = row.get("answer_gt", row.get("answer"))
        return blank if isinstance(blank, str) else None
    if found[1:] and found[0] != found[1]:
        raise RowError("keys 'answer_gt' and 'answer' hold different truths; keep one, or a list where any is right")
    return found[0]


def _truth(key: str, value: Any) -> str:
    truths = list(filter(holds, value)) if isinstance(value, (list, tuple)) else [value]
    for truth in truths:
        if not isinstance(truth, (str, int, float)) or isinstance(truth, bool):
            raise RowError(
                f"the ground truth '{key}' must be text, a number or a list of them, found {type(truth).__name__}"
            )
    texts = list(dict.fromkeys(map(str, truths)))
    return texts[0] if len(texts) == 1 else _PLAIN.encode(texts)


def _siblings(row: Mapping[str, Any], *keys: str) -> list[str]:
    """Those of some keys with one meaning that hold something: merged data sets have a column for each."""
    return [key for key in keys if key in row and holds(row[key])]


def _system(row: Mapping[str, Any]) -> str | None:
    system = row["system"]
    if system is not None and not isinstance(system, str):
        raise RowError(f"key 'system' must be text, found {type(system).__name__}")
    return system if holds(system) else None


def _history(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    history = row["history"] if holds(row["history"]) else []
    listed = history if isinstance(history, (list, tuple)) else [history]
    turns = tuple(tuple(turn) if isinstance(turn, (list, tuple)) else () for turn in listed)
    if any(len(turn) != 2 or not all(isinstance(text, str) and holds(text) for text in turn) for turn in turns):
        raise RowError("key 'history' must be a list of [question, answer], none of them empty")
    return turns


def _provenance(row: Mapping[str, Any], known: frozenset[str]) -> dict[str, Any]:
    given = row.get("provenance") or {}
    if not isinstance(given, dict):
        raise RowError("key 'provenance' must be an object")
    notes = [key for key in row if key not in known]
    if not notes:
        return given
    for key in notes:
        reason = why_refused(key, row)
        if reason is not None:
            raise RowError(reason)
    return {**given, **{key: row[key] for key in notes}}
