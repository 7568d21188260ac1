"""Log-probs of target tokens without full logits: the head works in tiles of tokens and vocabulary."""

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

# Bytes of logits that exist at a time. A CPU is as fast with little (measured from 1 to 16 MiB); a GPU wants large
# products: 192 MiB are 6,000 words for 8,000 scored tokens.
CPU_TILE_BYTES = 2**20
TILE_BYTES = 192 * 2**20
MIN_CHUNK = 1024  # words; products narrower than that are slow


class ScoringHead(nn.Linear):
    """An output head that also computes log-probs of given tokens without keeping logits.

    It takes over weight and bias of an existing head, so tied weights stay tied and checkpoints keep their keys.
    """

    def __init__(self, head: nn.Linear):
        """Take over the parameters of `head`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        self.train(head.training)

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        *,
        chunk_size: int | None = None,
        squares: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits, or log-probs of `targets` if they are given.

        Args:
            hidden: Shape: (..., D), with targets (S, D)
            targets: token ids. Shape: (S,)
            chunk_size: words for which logits exist at a time; None chooses.
            squares: also return log sum over words v of p(v)^2, without a gradient.

        Returns:
            Logits of shape (..., V), or log-probs of shape (S,), at least float32; with `squares` two of that shape.
        """
        if targets is None:
            return super().forward(hidden)
        if chunk_size is None:
            tile_bytes = CPU_TILE_BYTES if hidden.device.type == "cpu" else TILE_BYTES
            chunk_size = max(MIN_CHUNK, tile_bytes // (4 * len(hidden)))
        # Autocast does not reach the backward pass of an autograd function, so its casts are made here.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return _TargetLogps.apply(hidden.to(dtype), self.weight.to(dtype), bias, targets, chunk_size, squares)


class _TargetLogps(torch.autograd.Function):
    """log softmax(hidden weight^T + bias)[target], with the logits of one part of the vocabulary alive at a time.

    Kept for the backward pass: the inputs and one logsumexp a row. With p the probabilities and g the incoming
    gradient, the gradient of a row's logits is g (onehot(target) - p); the logits are computed again to get p. Parts of
    the vocabulary rather than of the rows, so that the gradient of the weight, the largest tensor, is written once.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_S: Tensor,
        chunk_size: int,
        squares: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        tiles = _Tiles(hidden_SD, weight_VD, bias_V, targets_S, chunk_size)
        largest_S = torch.full_like(targets_S, -torch.inf, dtype=tiles.dtype)
        total_S, score_S, squares_S = (torch.zeros_like(largest_S) for _ in range(3))
        for words in tiles.words:
            logits = tiles.logits(words)
            index_S, inside_S = tiles.targets(words)
            score_S = torch.where(inside_S, logits.gather(1, index_S[:, None])[:, 0], score_S)
            before_S, largest_S = largest_S, torch.maximum(largest_S, logits.amax(dim=1))
            shrink_S = (before_S - largest_S).exp_()
            total_S = total_S * shrink_S + logits.sub_(largest_S[:, None]).exp_().sum(dim=1)
            if squares:
                squares_S = squares_S * shrink_S.square_() + logits.square_().sum(dim=1)
        logsumexp_S = largest_S + total_S.log_()
        ctx.save_for_backward(hidden_SD, weight_VD, bias_V, targets_S, logsumexp_S)
        ctx.chunk_size = chunk_size
        if not squares:
            return score_S - logsumexp_S
        log_squares_S = squares_S.log_() + 2 * (largest_S - logsumexp_S)
        ctx.mark_non_differentiable(log_squares_S)
        return score_S - logsumexp_S, log_squares_S

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_S: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
        hidden_SD, weight_VD, bias_V, targets_S, logsumexp_S = ctx.saved_tensors
        tiles = _Tiles(hidden_SD, weight_VD, bias_V, targets_S, ctx.chunk_size)
        grad_hidden = torch.zeros_like(hidden_SD, dtype=tiles.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias_V) if ctx.needs_input_grad[2] else None
        for words in tiles.words:
            grad_logits = tiles.logits(words).sub_(logsumexp_S[:, None]).exp_().mul_(-grad_S[:, None])
            index_S, inside_S = tiles.targets(words)
            grad_logits.scatter_add_(1, index_S[:, None], torch.where(inside_S, grad_S, 0)[:, None])
            grad_logits = grad_logits.to(hidden_SD.dtype)
            if grad_hidden is not None:
                grad_hidden += grad_logits @ weight_VD[words]
            if grad_weight is not None:
                torch.mm(grad_logits.T, hidden_SD, out=grad_weight[words])
            if grad_bias is not None:
                grad_bias[words] = grad_logits.sum(0)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden_SD.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


class _Tiles:
    """The logits of all rows, a part of the vocabulary at a time, each written over the one before."""

    def __init__(
        self,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_S: Tensor,
        chunk_size: int,
    ):
        self.hidden_SD, self.weight_VD, self.bias_V, self.targets_S = hidden_SD, weight_VD, bias_V, targets_S
        # at least float32, so that sums over a large vocabulary stay exact
        self.dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
        num_words = len(weight_VD)
        self.words = [slice(start, min(start + chunk_size, num_words)) for start in range(0, num_words, chunk_size)]
        # one piece of memory for all, since an allocator may keep what is freed
        self.memory = hidden_SD.new_empty(len(hidden_SD) * min(chunk_size, num_words), dtype=self.dtype)

    def logits(self, words: slice) -> Tensor:
        """Return the logits of some words. Shape: (S, words)"""
        shape = len(self.hidden_SD), words.stop - words.start
        logits = self.memory[: shape[0] * shape[1]].view(shape)
        if self.hidden_SD.dtype == self.dtype:
            torch.mm(self.hidden_SD, self.weight_VD[words].T, out=logits)
        else:
            logits.copy_(self.hidden_SD @ self.weight_VD[words].T)
        if self.bias_V is not None:
            logits += self.bias_V[words]
        return logits

    def targets(self, words: slice) -> tuple[Tensor, Tensor]:
        """Return where each row's target lies among the words, and whether it is one of them. Shape: 2 x (S,)"""
        index_S = self.targets_S - words.start
        last = words.stop - words.start - 1
        return index_S.clamp(0, last), (index_S >= 0) & (index_S <= last)
