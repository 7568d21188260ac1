"""Models and processors as a run needs them; each import of transformers waits until one is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_mpo.errors import BadInputError

if TYPE_CHECKING:
    from internvl_mpo.training.settings import TrainSettings


def load_processor(source: str) -> Any:
    """Return the processor of a model; weights are read only after all pairs have been checked.

    Raises:
        BadInputError: there is no such model, or no family takes it.
    """
    from internvl_mpo.families.registry import family_of_source

    family = family_of_source(source)
    try:
        return family.load_processor(source)
    except (OSError, ValueError) as error:
        raise _cannot_load(source, error) from error


def check_reference_model(settings: "TrainSettings", processor: Any) -> None:
    """Refuse a reference that reads other tokens than the policy: pairs are encoded once for both.

    Raises:
        BadInputError: naming both models.
    """
    if not settings.reference_model:
        return
    other = load_processor(settings.reference_model)
    if other.tokenizer.get_vocab() != processor.tokenizer.get_vocab():
        raise BadInputError(f"reference_model {settings.reference_model} has another vocabulary than {settings.model}; "
                            "give a model that the policy was trained from")  # fmt: skip


def load_model(settings: "TrainSettings", source: str) -> Any:
    """Return the start model or the reference, cut in pieces already where ZeRO-3 trains it.

    Raises:
        BadInputError: its weights cannot be loaded.
    """
    from internvl_mpo.logps import attach_scoring
    from internvl_mpo.training import policy
    from internvl_mpo.training.distributed import start_ranks
    from internvl_mpo.training.identity import weights_dtype

    start_ranks(settings)
    try:
        # Scoring is attached before any adapter, whether or not reference log-probs are still missing: a resumed run
        # must take the very same path through the model.
        return attach_scoring(policy.load_model(source, weights_dtype(settings), in_4bit=settings.load_in_4bit))
    except (OSError, ValueError) as error:
        if isinstance(error, BadInputError):
            raise
        raise _cannot_load(source, error) from error


def _cannot_load(source: str, error: Exception) -> BadInputError:
    reason = " ".join(str(error).split())
    if not Path(source).is_dir():
        return BadInputError(f"'{source}' is no folder here, and the Hub does not give it: {reason}")
    return BadInputError(f"cannot load the model '{source}': {reason}")
