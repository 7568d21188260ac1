"""Every flag of `app.py`, checked before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internvl_mpo.demo.pictures import Limits
from internvl_mpo.errors import BadInputError
from internvl_mpo.settings import setting

MINI_BASE, MINI_MPO, MINI_RUNS = "outputs/mini/start", "outputs/mini/model", "outputs/mini/eval"


@dataclass(kw_only=True)
class DemoSettings:
    """Settings of `app.py`; `--help` prints them."""

    base: str | None = setting(None, help=f"model before MPO, a folder or Hub id; empty is {MINI_BASE}")
    mpo: str | None = setting(None, help=f"model after MPO, a folder or Hub id; empty is {MINI_MPO}")
    adapter: str | None = setting(
        None, help="LoRA adapter on --base instead of --mpo: both answers come from one mixed batch, half the memory"
    )
    base_url: str | None = setting(None, help="OpenAI-compatible server that answers as base, e.g. http://host:8000/v1")
    mpo_url: str | None = setting(
        None, help="OpenAI-compatible server that answers as MPO; --base and --mpo are then the names served there"
    )
    api_key_env: str = setting("OPENAI_API_KEY", help="environment variable with the key of these servers, if any")
    device: str = setting("auto", help="auto (CUDA, else CPU), cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", help="auto, float32, bfloat16, float16")
    four_bit: bool = setting(False, help="load weights in 4 bits (bitsandbytes)")
    preload: bool = setting(False, help="load the models at start, not with the first question")
    concurrency: int | None = setting(None, help="questions answered at once; empty is 1, or 16 with servers")

    style: Literal["cot", "direct", "r1", "plain"] = setting("cot", help="how questions are asked until changed")
    temperature: float = setting(0.0, help="0 is greedy")
    max_new_tokens: int = setting(1024, help="longest answer a visitor may ask for")
    max_tiles: int | None = setting(None, help="most tiles of all pictures together; empty is the model's own limit")
    blind: bool = setting(False, help="hide and shuffle which side is which until a vote")

    votes: str = setting("outputs/demo/votes", help="folder of votes and the pictures they are about")
    votes_repo: str | None = setting(None, help="data set repository on the Hub that votes are uploaded to")
    votes_every: float = setting(5.0, help="minutes between uploads of votes")
    shared: str = setting("outputs/demo/shared", help="folder of conversations that visitors chose to share")
    shared_days: float = setting(7.0, help="days after which a shared conversation is deleted")
    runs: list[str] = setting([], help=f"run folders of evaluate_mpo.py, or folders of them; empty is {MINI_RUNS}")

    max_upload_mb: float = setting(10.0, help="largest picture file")
    max_megapixels: float = setting(25.0, help="largest picture")
    max_images: int = setting(8, help="most pictures in one conversation")
    allow_image_urls: bool = setting(False, help="API: fetch pictures from public http(s) addresses")
    host: str = setting("127.0.0.1", help="address to listen on; 0.0.0.0 is every network of the machine")
    port: int = setting(7860, help="port; 0 takes a free one")
    mcp: bool = setting(False, help="also serve the API as MCP tools (pip install 'gradio[mcp]')")

    def __post_init__(self) -> None:
        if (self.base_url is None) != (self.mpo_url is None):
            missing = "mpo_url" if self.mpo_url is None else "base_url"
            raise BadInputError(f"missing setting '{missing}'; servers answer both sides or none")
        if self.adapter and (self.mpo or self.base_url):
            raise BadInputError("setting 'adapter' takes the place of --mpo and of servers; leave these out")
        if self.adapter and not self.base:
            raise BadInputError("setting 'adapter' needs --base, the model it was trained on")
        for key in ("max_new_tokens", "max_images", "concurrency", "max_tiles"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise BadInputError(f"setting '{key}' is {value}; give at least 1")
        for key in ("max_upload_mb", "max_megapixels", "votes_every", "shared_days"):
            if getattr(self, key) <= 0:
                raise BadInputError(f"setting '{key}' is {getattr(self, key)}; give a number above 0")
        if not 0 <= self.temperature <= 2:
            raise BadInputError(f"setting 'temperature' is {self.temperature}; give 0 (greedy) to 2")
        self.runs = self.runs or [MINI_RUNS]
        if not self.base_url:
            self._choose_models()

    @property
    def limits(self) -> Limits:
        """What visitors may send."""
        return Limits(int(self.max_upload_mb * 2**20), int(self.max_megapixels * 1e6), self.max_images)

    def _choose_models(self) -> None:
        """Fill in the mini models, or say how to make them."""
        self.base = self.base or MINI_BASE
        self.mpo = self.mpo or (None if self.adapter else MINI_MPO)
        absent = [name for name in (self.base, self.mpo) if name in (MINI_BASE, MINI_MPO) and not Path(name).is_dir()]
        if absent:
            raise BadInputError(
                f"{' and '.join(absent)} are not there yet; make them with `make quickstart` (some minutes on a "
                "laptop), or give --base and --mpo, each a model folder or Hub id"
            )
