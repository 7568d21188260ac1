"""Who answers prompts: one interface, several engines.

    engine = TransformersEngine("outputs/mini/model")
    for reply in engine.generate([Request(id="1", question="What is shown?", images=("a.png",))]):
        print(reply.id, reply.text)

Every engine takes `Request`s and yields one `Reply` for each, in any order; a request that could not be answered comes
back with `error` set and is never dropped. This file has no heavy imports, so that settings can be checked first.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from internvl_mpo.errors import BadInputError

ENGINES = ("transformers", "http", "vllm")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy; then top_k and top_p mean nothing.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        max_new_tokens: longest reply; a reply cut there has `finish_reason` "length".
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise BadInputError(f"temperature is {self.temperature}; give 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise BadInputError(f"top_k is {self.top_k}; give 0 (off) or a positive number")
        if not 0 < self.top_p <= 1:
            raise BadInputError(f"top_p is {self.top_p}; give a number above 0 and up to 1")
        if self.max_new_tokens < 1:
            raise BadInputError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")


@dataclass(frozen=True, kw_only=True)
class Request:
    """One reply that is wanted.

    Attributes:
        id: names the reply.
        question: the user's text; `<image>` marks where a picture goes, in the order of `images`.
        images: paths or PIL images.
        prefix: beginning of the assistant's turn, to be continued; the reply's text holds only what follows it.
        seed: fixes the draw of this reply, whatever else is in the batch.
        sampling: how tokens are drawn.
    """

    id: str
    question: str
    images: tuple[Any, ...] = ()
    prefix: str = ""
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back for the request with the same id.

    Attributes:
        text: the reply; after a prefix it keeps the space at the join.
        finish_reason: "stop" (the model ended its turn), "length" (cut), or "" with an error.
        num_tokens: tokens generated, the end of the turn included.
        error: why there is no reply, or None.
        served_model: the name a server signed the reply with; "" in this process.
    """

    id: str
    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    error: str | None = None
    served_model: str = ""


class Engine(Protocol):
    """Anything that answers requests; its name, model and revision are written into every row."""

    name: str
    model_id: str
    revision: str | None

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        """Yield a reply for every request whose id is not in `done`.

        Requests in `done` are passed all the same: an engine that batches forms the same batches as in an unbroken
        run, so that a resumed run draws the same replies.
        """
        ...
