"""Conversations stored only when a visitor asks for a link: an unguessable name, and an end.

    shared/ID/conversation.json   questions, controls, both answers, order of the panes
    shared/ID/0.png ...           the pictures

Nothing about the visitor is stored. The link is the only key; whoever has it can read the conversation.
"""

import dataclasses
import json
import re
import secrets
import shutil
import time
from pathlib import Path

from internvl_mpo.demo.conversation import SIDES, Answer, Controls, Conversation, Turn
from internvl_mpo.demo.pictures import Limits, read_picture
from internvl_mpo.errors import BadInputError

_ID = re.compile(r"[A-Za-z0-9_-]{22}")  # 128 random bits


class Shelf:
    """The folder of shared conversations.

    Args:
        folder: where they are.
        days: how long each is kept.
        limits: what pictures may be; nothing larger is read back.
    """

    def __init__(self, folder: str | Path, days: float, limits: Limits):
        self.folder, self.days, self._limits = Path(folder), days, limits

    def store(self, conversation: Conversation) -> str:
        """Store a conversation and return its id.

        Raises:
            BadInputError: there is nothing to share.
        """
        if not any(turn.is_finished for turn in conversation.turns):
            raise BadInputError("There is nothing to share yet; ask a question first.")
        self.clean()
        name = secrets.token_urlsafe(16)
        folder = self.folder / name
        folder.mkdir(parents=True)
        turns, number = [], 0
        for turn in conversation.turns:
            files = []
            for picture in turn.images:
                (folder / f"{number}.png").write_bytes(picture.png)
                files.append(f"{number}.png")
                number += 1
            turns.append(
                {
                    "question": turn.question,
                    "controls": dataclasses.asdict(turn.controls),
                    "images": files,
                    "answers": {side: dataclasses.asdict(turn.answers[side]) for side in SIDES},
                }
            )
        content = {
            "order": conversation.order,
            "blind": conversation.blind,
            "revealed": conversation.revealed,
            "turns": turns,
        }
        (folder / "conversation.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return name

    def open(self, name: str) -> Conversation:
        """Return a stored conversation.

        Raises:
            BadInputError: there is none of this name, or no longer.
        """
        self.clean()
        folder = self.folder / name
        if not _ID.fullmatch(name) or not (folder / "conversation.json").is_file():
            raise BadInputError(f"This shared conversation does not exist; links end after {self.days:g} days.")
        content = json.loads((folder / "conversation.json").read_text(encoding="utf-8"))
        turns = [
            Turn(
                question=turn["question"],
                controls=Controls(**turn["controls"]),
                images=tuple(
                    read_picture(
                        (folder / Path(file).name).read_bytes(),
                        file,
                        dataclasses.replace(self._limits, max_bytes=1 << 30),
                    )
                    for file in turn["images"]
                ),
                answers={side: Answer(**turn["answers"][side]) for side in SIDES},
            )
            for turn in content["turns"]
        ]
        return Conversation(turns, tuple(content["order"]), content["blind"], content["revealed"])

    def clean(self) -> None:
        """Delete what has come to its end."""
        if not self.folder.is_dir():
            return
        for folder in self.folder.iterdir():
            if _ID.fullmatch(folder.name) and time.time() - folder.stat().st_mtime > self.days * 86400:
                shutil.rmtree(folder, ignore_errors=True)
