"""Settings of every program that loads an engine."""

from dataclasses import dataclass
from typing import Literal

from internvl_mpo.engines import Sampling
from internvl_mpo.errors import BadInputError
from internvl_mpo.settings import setting


@dataclass(kw_only=True)
class EngineSettings:
    """Settings every program that asks a model has."""

    model: str | None = setting(None, help="folder or Hub id of the model; with --engine http its name on the server")
    engine: Literal["transformers", "http", "vllm"] = setting(
        "transformers",
        help="transformers (in this process), http (an OpenAI-compatible server), vllm (in this process)",
    )
    temperature: float = setting(1.0, help="0 is greedy")
    top_k: int = setting(50, help="draw from the k likeliest tokens; 0 is all")
    top_p: float = setting(1.0, help="draw from the likeliest tokens up to this probability")
    batch_size: int = setting(64, help="transformers: replies generated at the same time")
    max_tiles: int | None = setting(None, help="most crops per request; empty keeps the model's limit")
    device: str = setting("auto", help="transformers: torch device")
    dtype: str = setting("auto", help="auto, float32, bfloat16 or float16")
    trust_remote_code: bool = setting(False, help="run model code that comes with the weights")
    base_url: list[str] = setting([], help="http: URL of the server, several with commas")
    served_from: str | None = setting(
        None, help="http: folder or Hub id that every server must have loaded, looked at before the first reply"
    )
    api_key_env: str = setting("OPENAI_API_KEY", help="http: environment variable that holds the key, if there is one")
    concurrency: int = setting(64, help="http: requests in flight at the same time")
    timeout: float = setting(600.0, help="http: seconds one attempt may take")
    max_attempts: int = setting(6, help="http: how often a reply is asked for")
    requests_per_minute: float | None = setting(None, help="http: rate limit; empty is none")
    tensor_parallel: int = setting(1, help="vllm: GPUs one model is spread over")
    runner: Literal["local", "ray"] = setting("local", help="ray spreads the work over the actors of a Ray cluster")
    num_actors: int = setting(1, help="ray: engines, each in a process of its own")
    gpus_per_actor: float = setting(0.0, help="ray: GPUs of one engine")

    def __post_init__(self) -> None:
        if self.engine == "http" and not self.base_url:
            raise BadInputError("--engine http needs --base_url, e.g. http://localhost:8000/v1")
        if self.engine != "http" and self.model is None:
            raise BadInputError(f"--engine {self.engine} needs --model, a folder or Hub id")
        if self.batch_size < 1 or self.num_actors < 1:
            raise BadInputError("batch_size and num_actors must be at least 1")

    def sampling(self, max_new_tokens: int) -> Sampling:
        """Return the sampler; what greedy search ignores is set to its neutral value."""
        greedy = self.temperature == 0
        return Sampling(
            temperature=self.temperature,
            top_k=0 if greedy else self.top_k,
            top_p=1.0 if greedy else self.top_p,
            max_new_tokens=max_new_tokens,
        )
