"""vLLM in this process, where it is installed (its own environment: it pins torch and transformers).

For several machines or a long life prefer `vllm serve` and the http engine.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator

from vllm import LLM, SamplingParams

from internvl_mpo.engines import Reply, Request
from internvl_mpo.engines.chat_format import chat_payload
from internvl_mpo.engines.local import model_revision, refuse_control_tokens

# Requests handed over together: vLLM batches them itself and answers when all are done.
WINDOW = 1024


class VllmEngine:
    """Answers requests with vLLM's offline engine.

    Args:
        model_path: model folder or Hub id.
        dtype: "auto" or a torch dtype name.
        tensor_parallel: GPUs the model is spread over.
        max_tiles: most crops per picture; None keeps the model's own limit.
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
        self._llm = LLM(
            model=self.model_id,
            dtype=dtype,
            tensor_parallel_size=tensor_parallel,
            trust_remote_code=trust_remote_code,
            mm_processor_kwargs={} if max_tiles is None else {"max_dynamic_patch": max_tiles},
            enable_prefix_caching=True,  # the samples of one question share prompt and pictures
        )

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        """Yield replies window by window; see `Engine.generate`."""
        stream = (request for request in requests if request.id not in done)
        while window := list(itertools.islice(stream, WINDOW)):
            for continued in (False, True):
                yield from self._answer([request for request in window if bool(request.prefix) == continued], continued)

    def _answer(self, requests: list[Request], continued: bool) -> Iterator[Reply]:
        usable, conversations = [], []
        for request in requests:
            try:
                refuse_control_tokens(self._llm.get_tokenizer(), request)
                conversations.append(chat_payload(request, self.model_id)["messages"])
                usable.append(request)
            except (OSError, ValueError) as error:
                yield Reply(id=request.id, error=str(error))
        if not usable:
            return
        outputs = self._llm.chat(
            conversations,
            [_sampling_params(request) for request in usable],
            add_generation_prompt=not continued,
            continue_final_message=continued,
            use_tqdm=False,
        )
        for request, output in zip(usable, outputs, strict=True):
            best = output.outputs[0]
            reply = Reply(
                id=request.id,
                text=best.text if continued else best.text.strip(),
                finish_reason=best.finish_reason or "",
                num_tokens=len(best.token_ids),
            )
            failed = reply.finish_reason not in ("stop", "length")
            yield dataclasses.replace(reply, error=f"vLLM ended with '{best.finish_reason}'") if failed else reply


def _sampling_params(request: Request) -> SamplingParams:
    sampling = request.sampling
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k or -1,
        top_p=sampling.top_p,
        max_tokens=sampling.max_new_tokens,
        seed=request.seed,
    )
