"""Votes become rows of MMPR: what visitors prefer is training data of the next round.

    votes.jsonl    {"id", "image", "question", "chosen", "rejected", "source": "demo_votes", "rule": "vote",
                    "provenance": {"chosen_by": "mpo", "models", "sampling", "blind", "shown_left", "time"}}
    other.jsonl    ties, "both bad", and votes that are no preference between two answers to one prompt
    images/        the pictures, named by content

`train_mpo.py --data votes.jsonl` reads the first file as it is. The second keeps both answers and the verdict under
names of their own, so that no reader takes a tie for a preference: ties are good for calibration, "both bad" names
questions that need a better answer. A follow-up question is one of these: each side had its own history, so the two
answers do not share a prompt.
"""

import hashlib
import json
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Literal

from internvl_mpo.demo.conversation import SIDES, Conversation, Turn, transcript
from internvl_mpo.demo.pictures import Picture
from internvl_mpo.demo.streaming import Names
from internvl_mpo.errors import BadInputError
from internvl_mpo.records import PreferencePair

Verdict = Literal["left", "right", "tie", "both_bad"]
VERDICTS = ("left", "right", "tie", "both_bad")
SOURCE = "demo_votes"
_WHY = {"follow_up": "a follow-up has two different histories", "same_text": "both sides say the same"}


class VoteBox:
    """Keeps votes on the disk, and on the Hub where a repository is named.

    Args:
        folder: where the files are; made with the first vote.
        repo: data set repository on the Hub; the folder is committed to it every `every` minutes.
        every: minutes between uploads.

    Each process writes files of its own when it uploads (`votes-1f3c.jsonl`): a restarted Space has an empty disk, and
    a file of the same name would replace what was uploaded before.
    """

    def __init__(self, folder: str | Path, repo: str | None = None, every: float = 5.0):
        self.folder = Path(folder)
        suffix = f"-{uuid.uuid4().hex[:8]}" if repo else ""
        self.path = self.folder / f"votes{suffix}.jsonl"
        self.other_path = self.folder / f"other{suffix}.jsonl"
        self._lock: Any = threading.Lock()
        self._scheduler = None
        if repo:
            from huggingface_hub import CommitScheduler

            self.folder.mkdir(parents=True, exist_ok=True)
            self._scheduler = CommitScheduler(
                repo_id=repo, folder_path=self.folder, every=every, repo_type="dataset", private=True
            )
            self._lock = self._scheduler.lock  # no upload in the middle of a line

    def cast(self, conversation: Conversation, verdict: Verdict, names: dict[str, Names]) -> str:
        """Store a vote about the last turn and return a sentence about what was stored.

        Raises:
            BadInputError: there is nothing to vote on yet, or it was voted on.
        """
        if verdict not in VERDICTS:
            raise BadInputError(f"a vote is one of {', '.join(VERDICTS)}, not '{verdict}'")
        if not conversation.turns or not conversation.turns[-1].is_finished:
            raise BadInputError("There is nothing to vote on yet; ask a question and wait for both answers.")
        turn = conversation.turns[-1]
        if turn.vote:
            raise BadInputError("Your vote on these answers is stored already; ask another question to vote again.")
        if not all(turn.answers[side].text for side in SIDES):
            raise BadInputError("One side gave no answer, so there is nothing to compare.")
        winner = dict(zip(("left", "right"), conversation.order, strict=True)).get(verdict)
        why_no_pair = _why_no_pair(conversation, winner, verdict)
        provenance = _provenance(conversation, names)
        if winner and not why_no_pair:
            row, path = _pair(turn, winner, provenance), self.path
            said = "Thank you, stored as a preference."
        else:
            row, path = _other_row(conversation, winner or verdict, why_no_pair, provenance), self.other_path
            said = (
                f"Thank you, stored (as no preference pair: {_WHY[why_no_pair]})." if winner else "Thank you, stored."
            )
        with self._lock:
            self._write_pictures(conversation)
            with open(path, "a", encoding="utf-8") as out:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            turn.vote = row
        return said

    def flush(self) -> None:
        """Upload what has not been uploaded yet."""
        if self._scheduler is not None:
            self._scheduler.trigger().result()

    def _write_pictures(self, conversation: Conversation) -> None:
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        for turn in conversation.turns:
            for picture in turn.images:
                path = self.folder / picture_name(picture)
                if not path.exists():
                    path.write_bytes(picture.png)


def _why_no_pair(conversation: Conversation, winner: str | None, verdict: Verdict) -> str:
    """Why a vote is no preference between two answers to one prompt; "" if it is one."""
    if len(conversation.turns) > 1:
        return "follow_up"
    if winner is None:
        return verdict
    base, mpo = (conversation.turns[-1].answers[side].text for side in SIDES)
    return "same_text" if base == mpo else ""


def _pair(turn: Turn, winner: str, provenance: dict[str, Any]) -> dict[str, Any]:
    loser = "base" if winner == "mpo" else "mpo"
    return PreferencePair(
        images=tuple(map(picture_name, turn.images)),
        question=turn.asked,
        chosen=turn.answers[winner].text,
        rejected=turn.answers[loser].text,
        source=SOURCE,
        rule="vote",
        provenance={"chosen_by": winner, **provenance},
    ).to_json()


def _other_row(
    conversation: Conversation, verdict: str, why_no_pair: str, provenance: dict[str, Any]
) -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex[:16],
        "images": [picture_name(picture) for turn in conversation.turns for picture in turn.images],
        "verdict": verdict,
        "why_no_pair": why_no_pair,
        "conversations": {side: transcript(conversation.turns, side) for side in SIDES},
        "source": SOURCE,
        "provenance": provenance,
    }


def _provenance(conversation: Conversation, names: dict[str, Names]) -> dict[str, Any]:
    turn = conversation.turns[-1]
    controls = turn.controls
    return {
        "models": {side: names[side]._asdict() for side in SIDES},
        "style": controls.style,
        "sampling": {
            "temperature": controls.temperature,
            "max_new_tokens": controls.max_new_tokens,
            "max_tiles": controls.max_tiles,
            "seed": controls.seed,
        },
        "finish_reasons": {side: turn.answers[side].finish_reason for side in SIDES},
        "blind": conversation.blind and not conversation.revealed,
        "shown_left": conversation.order[0],
        "time": int(time.time()),
    }


def picture_name(picture: Picture) -> str:
    """Return where a picture lies beside the rows that show it; the same picture has the same name."""
    return f"images/{hashlib.sha256(picture.png).hexdigest()[:20]}.png"
