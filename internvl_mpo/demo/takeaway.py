"""A conversation as a file to take away: Markdown to read, pictures, and the voted pairs as training data.

conversation.md    questions, pictures and both answers
images/            the pictures, named by content
pairs.jsonl        rows for `train_mpo.py --data`, if a question was voted on
"""

import json
import zipfile
from pathlib import Path

from internvl_mpo.demo.conversation import Conversation, Turn
from internvl_mpo.demo.votes import picture_name
from internvl_mpo.errors import BadInputError

NAME = "conversation.zip"


def write_takeaway(conversation: Conversation, names: dict[str, str], folder: Path) -> Path:
    """Write `conversation.zip` into a folder and return its path.

    Args:
        conversation: with at least one answered question.
        names: what each pane is called, by side; blinded panes are called by their letters.
        folder: where the file goes.

    Raises:
        BadInputError: nothing has been answered yet.
    """
    turns = [turn for turn in conversation.turns if turn.is_finished]
    if not turns:
        raise BadInputError("There is nothing to save yet; ask a question first.")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / NAME, "w", zipfile.ZIP_DEFLATED) as file:
        text = "\n".join(_as_markdown(turn, conversation, names) for turn in turns)
        file.writestr("conversation.md", text)
        for name, picture in {picture_name(one): one for turn in turns for one in turn.images}.items():
            file.writestr(name, picture.png)
        pairs = [turn.vote for turn in turns if turn.vote and "chosen" in turn.vote]
        if pairs:
            file.writestr("pairs.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs))
    return folder / NAME


def _as_markdown(turn: Turn, conversation: Conversation, names: dict[str, str]) -> str:
    lines = [f"## {turn.question}", "", *(f"![picture]({picture_name(picture)})" for picture in turn.images), ""]
    for position, side in enumerate(conversation.order):
        letter = "AB"[position]
        title = letter if conversation.hides_names else f"{letter} · {names[side]}"
        lines += [f"### {title}", "", turn.answers[side].text, ""]
    return "\n".join(lines)
