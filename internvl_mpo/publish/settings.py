"""What all kinds of publication share: settings, and what a builder leaves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from internvl_mpo.errors import BadInputError
from internvl_mpo.settings import setting


class Built(NamedTuple):
    """What a builder leaves.

    Attributes:
        folder: the folder that goes to the Hub.
        rows: of a data set, what a stranger read from it; see `clean_rows.py`.
    """

    folder: Path
    rows: dict[str, Any] | None = None


@dataclass(kw_only=True)
class HubSettings:
    """Where to push, and how."""

    push: str | None = setting(None, help="Hub repository to upload to, as OWNER/NAME; none = build and check only")
    private: bool = setting(False, help="make the repository private if it has to be created")
    create_pr: bool = setting(False, help="propose the change as a pull request")
    revision: str | None = setting(None, help="branch, made if absent, or an open pull request such as refs/pr/1")
    overwrite: bool = setting(False, help="allow files of the repository to be replaced and removed")
    dry_run: bool = setting(False, help="list files, sizes and what would change; upload nothing")
    attempts: int = setting(4, help="how often an upload is tried when network or server fail")

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise BadInputError(f"attempts is {self.attempts}; give at least 1")
        if self.create_pr and self.revision:
            raise BadInputError("a pull request goes to the main branch; leave --revision or --create_pr out")
        for name in ("private", "create_pr", "revision", "overwrite"):
            if getattr(self, name) and not self.push:
                raise BadInputError(f"--{name} needs a repository; give --push OWNER/NAME")

    @property
    def owner(self) -> str | None:
        """Whom the repository belongs to."""
        return self.push.split("/")[0] if self.push else None
