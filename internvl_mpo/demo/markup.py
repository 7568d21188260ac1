r"""Text of a model or a visitor as Markdown that carries no markup of its own, however the page's renderer reads it.

Nothing here has to agree with the renderer about what is code or a formula: in each of them `<` and `![` are spelled so
that they begin no tag and no picture even where the renderer sees plain text.

    plain text      <b>  ->  &lt;b>         ![a](b)  ->  !\[a](b)
    `code`          <b>  ->  <(joiner)b>    an invisible character, so that it looks as it was written
    $formula$       <b   ->  < b            blanks mean nothing there
    fenced block    as it stands, so that it can be copied, where all fences of the text are plain ones at the start of
                    a line, which every dialect of Markdown reads alike; as `code` elsewhere

Links keep http(s) and mailto addresses. The name after a fence is kept only if it is that of a plain language.
"""

import re

_LINE_END = re.compile("\r\n|[\r\u2028\u2029\x0b\x0c\x85]")
_FENCE = re.compile(
    r"^(?P<mark>(?P<one>[`~])(?P=one){2,})(?P<name>[^`\n]*)\n(?P<code>.*?)(?:^(?P=mark)(?P=one)*[ \t]*$|\Z)",
    re.M | re.S,
)
_FENCE_LIKE = re.compile(r"^.*(?:```|~~~).*$", re.M)
_PLAIN_FENCE = re.compile(r"(?:`{3,}|~{3,})[A-Za-z0-9+#-]{0,20}[ \t]*")
_DRAWN = {"mermaid"}  # languages that the page's renderer turns into pictures
_CODE = r"(?<!`)(?P<run>`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)(?P=run)(?!`)"
_FORMULA = r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)|\$[^$\n]+\$"
_CODE_OR_FORMULA = re.compile(f"{_CODE}|{_FORMULA}", re.S)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_LINK_ELSEWHERE = re.compile(r"\]\((?!\s*(?:https?:|mailto:))")
_DEFINITION = re.compile(r"^([ \t>]*)\[(?=[^\]\n]*\]:)", re.M)
_JOINER = "\u2060"


def safe_markdown(text: str) -> str:
    """Return a text that can be put into a page as Markdown."""
    text = _LINE_END.sub("\n", text)
    fences_are_plain = all(_PLAIN_FENCE.fullmatch(line[0]) for line in _FENCE_LIKE.finditer(text))
    pieces, end = [], 0
    for fence in _FENCE.finditer(text):
        pieces += [_outside_fences(text[end : fence.start()]), _fenced(fence, fences_are_plain)]
        end = fence.end()
    return "".join([*pieces, _outside_fences(text[end:])])


def _fenced(fence: re.Match[str], as_it_stands: bool) -> str:
    name = fence["name"].strip()
    name = name if as_it_stands and name.lower() not in _DRAWN else ""
    code = fence["code"] if as_it_stands else _in_code(fence["code"])
    end = "" if code.endswith("\n") or not code else "\n"
    return f"{fence['mark']}{name}\n{code}{end}{fence['mark']}"


def _outside_fences(text: str) -> str:
    """Code spans, formulas and the rest, each with the spelling that shows in it as it was written."""
    pieces, end = [], 0
    for match in _CODE_OR_FORMULA.finditer(text):
        inside = _in_code(match[0]) if match["run"] else _in_formula(match[0])
        pieces += [_plain(text[end : match.start()]), inside]
        end = match.end()
    return "".join([*pieces, _plain(text[end:])])


def _plain(text: str) -> str:
    text = _TAG.sub("&lt;", text).replace("![", r"!\[")
    return _DEFINITION.sub(r"\1\\[", _LINK_ELSEWHERE.sub("] (", text))


def _in_code(text: str) -> str:
    text = _TAG.sub(f"<{_JOINER}", text).replace("![", f"!{_JOINER}[")
    return _LINK_ELSEWHERE.sub(f"]{_JOINER}(", text)


def _in_formula(text: str) -> str:
    return _LINK_ELSEWHERE.sub("] (", _TAG.sub("< ", text).replace("![", "! ["))
