"""Who answers: two checkpoints, one base with a LoRA adapter, or two servers. All stream both sides at the same time.

    for base, mpo in backend.stream(question):      # Answers so far, until both have a finish_reason
        ...

An answer is written by threads of the backend and read here. Closing the generator stops the threads and waits for
them, so nothing goes on computing for a visitor who has left. Models are loaded with the first question, once, behind
a lock; the page asks for one answer at a time per device.
"""

import os

from internvl_mpo.demo.local_models import LocalModels
from internvl_mpo.demo.servers import Servers
from internvl_mpo.demo.settings import DemoSettings
from internvl_mpo.demo.streaming import Backend


def make_backend(settings: DemoSettings) -> Backend:
    """Return who answers, by the settings; nothing is loaded yet."""
    if settings.base_url:
        return Servers(
            {"base": settings.base_url, "mpo": settings.mpo_url},
            {"base": settings.base, "mpo": settings.mpo},
            os.environ.get(settings.api_key_env),
        )
    options = {"device": settings.device, "dtype": settings.dtype, "four_bit": settings.four_bit}
    return LocalModels(settings.base, settings.mpo, adapter=settings.adapter, **options)
