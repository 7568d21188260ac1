"""References that are computed while training runs, for runs that cannot or do not want to use the cache.

    AdapterOff        the start model is the policy with its LoRA adapters switched off: nothing to store
    StartWeights      the start model's weights beside the policy's, for the windows of `reference_pass ahead`
    MovingReference   TR-DPO (arXiv 2404.09656): every few steps the reference moves towards the policy

None is a second model. A moving reference keeps a second set of the weights that are trained (all of them, or the
adapters only) and puts it in the place of the policy's for the length of one forward pass.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from internvl_mpo.errors import BadInputError
from internvl_mpo.logps import pair_logps
from internvl_mpo.packing import Pack
from internvl_mpo.training.policy import own_share, release_gathered

WEIGHTS_FILE = "moving_reference.safetensors"


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and drop path are off for a reference, whatever the policy does."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class AdapterOff:
    """The start model inside a PEFT policy."""

    is_live = True

    def __init__(self, model: nn.Module):
        """Keep the policy.

        Args:
            model: PEFT model that went through `attach_scoring`, not wrapped by DDP or DeepSpeed.

        Raises:
            BadInputError: it has no adapters.
        """
        if not hasattr(model, "disable_adapter"):
            raise BadInputError("reference adapter_off needs adapters; set lora_rank above 0, or use reference cache")
        self.model = model

    @torch.no_grad()
    def logps(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Return what `pair_logps` does, under the start model. Shape: 2 x (P,)"""
        with _evaluating(self.model), self.model.disable_adapter():
            return pair_logps(self.model, pack)


class StartWeights:
    """The start model, whose log-probs are wanted now and then while the policy moves away from it.

    Of the weights that are trained a copy lies in host memory. For a window the two change places, one weight at a
    time, so the device holds no more than before; with adapters nothing is copied, they are switched off.
    """

    def __init__(self, model: nn.Module):
        """Copy what is trained.

        Args:
            model: the policy as it starts, through `attach_scoring`, not wrapped. Weights partitioned by ZeRO-3
                will not do; of those partitioned by FSDP2 each rank copies its share.
        """
        self.model = model
        self.has_adapters = hasattr(model, "disable_adapter")
        trained = {} if self.has_adapters else {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = trained
        self.weights = {name: own_share(p.detach()).to("cpu", copy=True) for name, p in trained.items()}

    @contextlib.contextmanager
    def in_place(self) -> Iterator[nn.Module]:
        """Give the start model inside the block; the policy is back afterwards, bit for bit."""
        with _evaluating(self.model):
            if self.has_adapters:
                with self.model.disable_adapter():
                    yield self.model
                return
            self._exchange()
            try:
                yield self.model
            finally:
                self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        release_gathered(self.model)
        for name, parameter in self.parameters.items():
            own = own_share(parameter.detach())
            other = own.to("cpu", copy=True)
            own.copy_(self.weights[name])
            self.weights[name] = other


class MovingReference:
    """Reference weights that follow the policy: ref <- alpha * policy + (1 - alpha) * ref.

    Until the first move the reference is the start model, whose log-probs are in the cache.
    """

    def __init__(self, model: nn.Module, alpha: float):
        """Keep the policy; memory is taken by `start` or `load`.

        Args:
            model: policy that went through `attach_scoring`, not wrapped. Weights partitioned by ZeRO-3 will not do.
            alpha: share of the policy in a move, above 0 and at most 1; 1 copies the policy.
        """
        self.model, self.alpha = model, alpha
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {}
        self.num_moves = 0

    @property
    def is_live(self) -> bool:
        """Whether the cached log-probs of the start model have become wrong."""
        return self.num_moves > 0

    def start(self) -> None:
        """Take a copy of the policy as it is now, unless `load` has brought one."""
        if not self.weights:
            self.weights = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def move(self) -> None:
        """Move towards the policy."""
        for name, parameter in self.parameters.items():
            self.weights[name].lerp_(parameter.detach(), self.alpha)
        self.num_moves += 1

    @torch.no_grad()
    def logps(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Return what `pair_logps` does, under the reference. Shape: 2 x (P,)"""
        with _evaluating(self.model), self._in_place_of_the_policy():
            return pair_logps(self.model, pack)

    @contextlib.contextmanager
    def _in_place_of_the_policy(self) -> Iterator[None]:
        """Swap pointers, not values; the views that DeepSpeed holds of the policy's weights stay what they are."""
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.weights[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]

    def save(self, folder: str | Path) -> None:
        """Write the weights into a checkpoint folder."""
        from safetensors.torch import save_file

        tensors = {name: weight.cpu().contiguous() for name, weight in self.weights.items()}
        save_file(tensors, Path(folder) / WEIGHTS_FILE, metadata={"num_moves": str(self.num_moves)})

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            BadInputError: the checkpoint holds no moving reference, or one of other weights.
        """
        from safetensors import safe_open

        path = Path(folder) / WEIGHTS_FILE
        if not path.is_file():
            raise BadInputError(f"{folder} holds no {WEIGHTS_FILE}; it was made without reference_sync_steps")
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(self.parameters):
                raise BadInputError(f"{path} is the reference of a run that trained other weights")
            self.num_moves = int(file.metadata()["num_moves"])
            for name, parameter in self.parameters.items():
                self.weights[name] = file.get_tensor(name).to(parameter.device)
