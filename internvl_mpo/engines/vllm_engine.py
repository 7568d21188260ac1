"""vLLM in this process, where it is installed (its own environment: it pins torch and transformers).

For several machines or a long life prefer `vllm serve` and the http engine.
"""

import gc
import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from PIL import Image
from transformers import PretrainedConfig
from vllm import LLM, CompletionOutput, SamplingParams

from internvl_mpo.engines import Reply, Request
from internvl_mpo.engines.chat_format import chat_payload
from internvl_mpo.engines.revision import model_revision

try:
    from vllm.exceptions import VLLMClientError
except ImportError:
    VLLMClientError = ValueError  # what versions before 0.30 or so raise
_REFUSALS = (ValueError, VLLMClientError)  # of a prompt; an engine that died raises something else

# Requests handed over together: vLLM batches them itself and answers when all are done.
WINDOW = 1024


class VllmEngine:
    """Answers requests with vLLM's offline engine.

    It is started with the first requests, for as many pictures a prompt as they have, and anew if later ones have more.

    Args:
        model_path: model folder or Hub id.
        dtype: "auto" or a torch dtype name.
        tensor_parallel: GPUs the model is spread over.
        max_tiles: most crops of all pictures of a request together; None keeps the model's own limit.
        trust_remote_code: run the model code inside the folder.
    """

    name = "vllm"

    def __init__(
        self,
        model_path: str,
        *,
        dtype: str = "auto",
        tensor_parallel: int = 1,
        max_tiles: int | None = None,
        trust_remote_code: bool = False,
    ):
        self.model_id = str(model_path)
        self.revision = model_revision(self.model_id)
        self.max_tiles = max_tiles or PretrainedConfig.get_config_dict(self.model_id)[0].get("max_dynamic_patch")
        self._settings = {
            "model": self.model_id,
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel,
            "trust_remote_code": trust_remote_code,
            "enable_prefix_caching": True,  # the samples of one question share prompt and pictures
        }
        self._llm: LLM | None = None
        self._most_images = 0

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        """Yield replies window by window; see `Engine.generate`."""
        stream = (request for request in requests if request.id not in done)
        while window := list(itertools.islice(stream, WINDOW)):
            self._start(max(len(request.images) for request in window))
            # what is the same for all prompts of a call
            kinds = itertools.groupby(sorted(window, key=_kind), key=_kind)
            for _, alike in kinds:
                yield from self._answer(list(alike))

    def _start(self, most_images: int) -> None:
        """Start vLLM unless it runs and takes so many pictures a prompt."""
        if self._llm is None or most_images > self._most_images:
            self._llm = None
            gc.collect()  # ends the engine that runs, and with it frees its memory
            self._most_images = most_images
            self._llm = LLM(**self._settings, limit_mm_per_prompt={"image": most_images})

    def _answer(self, requests: list[Request]) -> Iterator[Reply]:
        usable, conversations = [], []
        for request in requests:
            try:
                conversations.append(chat_payload(request, self.model_id)["messages"])
                usable.append(request)
            except (OSError, ValueError, Image.DecompressionBombError) as error:
                yield Reply(id=request.id, error=str(error))
        if usable:
            yield from self._ask(usable, conversations)

    def _ask(self, requests: list[Request], conversations: list[Any]) -> Iterator[Reply]:
        """Hand over prompts; one that vLLM refuses is looked for by halves, so that it costs only itself."""
        num_images, continued = _kind(requests[0])
        try:
            outputs = self._llm.chat(
                conversations,
                [_sampling_params(request) for request in requests],
                add_generation_prompt=not continued,
                continue_final_message=continued,
                mm_processor_kwargs=self._tile_limit(num_images),
                use_tqdm=False,
            )
        except _REFUSALS as error:
            if len(requests) == 1:
                yield Reply(id=requests[0].id, error=str(error))
                return
            half = len(requests) // 2
            yield from self._ask(requests[:half], conversations[:half])
            yield from self._ask(requests[half:], conversations[half:])
            return
        for request, output in zip(requests, outputs, strict=True):
            yield _reply(request, output.outputs[0])

    def _tile_limit(self, num_images: int) -> dict[str, int] | None:
        """All pictures of a request share its tiles, as in training and in every engine here."""
        if not num_images or self.max_tiles is None:
            return None
        return {"max_dynamic_patch": max(1, self.max_tiles // num_images)}


def _kind(request: Request) -> tuple[int, bool]:
    return len(request.images), bool(request.prefix)


def _reply(request: Request, best: CompletionOutput) -> Reply:
    if best.finish_reason not in ("stop", "length"):
        return Reply(id=request.id, error=f"vLLM ended with '{best.finish_reason}'")
    text = best.text if request.prefix else best.text.strip()
    return Reply(id=request.id, text=text, finish_reason=best.finish_reason, num_tokens=len(best.token_ids))


def _sampling_params(request: Request) -> SamplingParams:
    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k or -1,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        seed=request.seed,
    )
