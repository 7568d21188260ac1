"""Which keys of a row are read, which are notes, and which are refused.

A key that could change what the model sees, or what counts as right, is read or refused by name. Every other key is a
note: it is kept under `provenance` and changes nothing.
"""

import re
from collections.abc import Mapping
from typing import Any

# Keys that some form of a row is read from; see `forms`.
READ = (
    *("image", "images", "question", "answer", "answer_gt", "chosen", "rejected", "response", "system", "history"),
    *("prompt", "messages", "conversations", "conversation", "instruction", "input", "output", "query"),
    *("rejected_response", "rejected_messages", "rejected_images"),
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_SOUND_AND_MOTION = _words("video clip frame audio sound speech voice")
_MEDIA = _SOUND_AND_MOTION | _words("image img picture pic photo figure screenshot")
_INPUT = _MEDIA | _words(
    "mask bbox box region object question prompt query instruction input context passage document hint option choice "
    "system user assistant human history conversation message dialog dialogue chat turn tool function prefix suffix "
    "text content chosen choosen rejected reject preferred response completion output"
)
_TRUTH = _words("answer truth gt gold label target")
# Last words of keys that say something about an input without being one: image_id, chosen_score, num_images.
_NOTE = _words(
    "id idx index uid uuid name path file filename type kind source split origin dataset domain category subject topic "
    "level difficulty lang language len length num count token char word size width height wh hw shape format ext hash "
    "md5 sha sha1 sha256 checksum score rating rank reward logp logprob prob probability confidence margin weight cost "
    "time date timestamp model engine annotator author license version seed temperature meta metadata info stat tag "
    "note comment rule style status flag valid error mode"
)
_COUNTS = _words("num n is has was use")
_MEDIA_FILE = re.compile(
    r"\.(png|jpe?g|gif|bmp|webp|tiff?|avif|heic|mp4|avi|mov|mkv|webm|wav|mp3|flac|ogg|m4a)$|^data:(image|video|audio)/",
    re.IGNORECASE,
)
_MEDIA_PLACE = re.compile(r"(?m)^\s*<(video|audio)>|<(video|audio)>\s*$")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")


def holds(value: Any) -> bool:
    """Return whether a value says anything: null, NaN, blank text, and lists or objects of nothing but these do not."""
    if value is None or value != value:  # a table without an entry gives null or NaN
        return False
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, Mapping):
        return any(map(holds, value.values()))
    return any(map(holds, value)) if isinstance(value, (list, tuple)) else True


def why_refused(key: str, row: Mapping[str, Any]) -> str | None:
    """Return why a key that nothing reads must not be passed over, or None for a note.

    Args:
        key: a key of `row`.
        row: the row as it stands.
    """
    if not holds(row[key]):
        return None
    words = [_singular(word.lower()) for word in _WORD.findall(key)]
    media = _MEDIA & set(words)
    if words and (words[-1] in _NOTE or words[0] in _COUNTS):
        is_of_picture = not media & _SOUND_AND_MOTION and any(holds(row.get(name)) for name in ("image", "images"))
        hidden = _names_media(row[key]) and not is_of_picture
        return f"key '{key}' names a file that is not read; {_way_out(media or {'image'})}" if hidden else None
    if _INPUT & set(words):
        return f"key '{key}' holds model input that is not read; {_way_out(media)}"
    if _TRUTH & set(words):
        return f"key '{key}' looks like the ground truth, which is read from 'answer' or 'answer_gt'; or {_AS_NOTE}"
    near = next((name for name in READ if is_misspelt(key.strip().lower(), name)), None)
    if near:
        return f"key '{key}' is not read; if it is '{near}' misspelt, rename it, and if it is a note, {_AS_NOTE}"
    return f"key '{key}' names a file that is not read; {_way_out({'image'})}" if _names_media(row[key]) else None


def place_of_media(text: str) -> str | None:
    """Return the `<video>` or `<audio>` that stands at an edge of a line, where other programs put such a file."""
    found = _MEDIA_PLACE.search(text) if "<video>" in text or "<audio>" in text else None
    return found and found[0].strip()


def is_misspelt(word: str, name: str) -> bool:
    """Return whether `word` is `name` up to one slip of the keyboard, two in long names."""
    limit = 1 if len(name) < 8 else 2
    return len(word) > 3 and abs(len(word) - len(name)) <= limit and _distance(word, name) <= limit


_AS_NOTE = "move it under 'provenance'"


def _way_out(media: frozenset[str] | set[str]) -> str:
    if media & {"video", "clip", "frame"}:
        how = "give frames as 'image', one <image> each"
    elif media & _SOUND_AND_MOTION:
        how = "leave the row out"
    else:
        how = "write it into 'image'" if media else "write it into 'question'"
    return f"{how}, or, if it is a note, {_AS_NOTE}"


def _singular(word: str) -> str:
    return word[:-1] if word.endswith("s") and len(word) > 3 and not word.endswith("ss") else word


def _names_media(value: Any) -> bool:
    if isinstance(value, str):
        return bool(_MEDIA_FILE.search(value))
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return any(map(_names_media, values))


def _distance(first: str, second: str) -> int:
    """Edits between two words; two neighbours that changed places are one edit."""
    before, row = [], list(range(len(second) + 1))
    for i, left in enumerate(first):
        before, last, row = row, before, [i + 1]
        for j, right in enumerate(second):
            cost = min(before[j + 1] + 1, row[j] + 1, before[j] + (left != right))
            if i and j and left == second[j - 1] and first[i - 1] == right:
                cost = min(cost, last[j - 1] + 1)
            row.append(cost)
    return row[-1]
