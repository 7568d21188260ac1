"""Watches the numbers of a run and speaks up: what goes wrong slowly, and what a greedy answer looks like.

    watch = Watch()
    for sentence in watch.look(step, logs): print("warning:", sentence)

Each warning is given once, with the window and the threshold it comes from. Loss and gradients that are not finite are
not warnings: they stop the run, see `dump_step` and `internvl_mpo.replay`.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from internvl_mpo.preference_terms import REFERENCE_FREE, Pairs, preference_term


class Watch:
    """Looks at the log lines of a run."""

    def __init__(
        self,
        *,
        window: int = 50,
        falling: float = -0.05,
        noise: float = 0.001,
        repetition_rise: float = 0.2,
    ):
        """Set the thresholds.

        Args:
            window: log lines that are averaged.
            falling: nats a token; chosen log-probs count as falling when their mean change against the reference is
                below this over a window, and below that of the window before.
            noise: rewards count as equal when their standard deviation has not been above this in the first window;
                see `rounding_noise`.
            repetition_rise: greedy answers count as repetitive when the share of repeated 4-grams has risen by this
                since the first samples.
        """
        self.window, self.falling = window, falling
        self.noise, self.repetition_rise = noise, repetition_rise
        self.changes: deque[float] = deque(maxlen=2 * window)
        self.largest_spread, self.num_spreads = 0.0, 0
        self.first_repetition: float | None = None
        self.given: set[str] = set()

    def look(self, step: int, logs: Mapping[str, float]) -> list[str]:
        """Take a log line in and return the warnings it gives rise to."""
        found = {
            "falling": self._falling(logs),
            "equal": self._equal(logs),
            "repetition": self._repetition(logs),
        }
        new = {name: sentence for name, sentence in found.items() if sentence and name not in self.given}
        self.given |= new.keys()
        return [f"step {step}: {sentence}" for sentence in new.values()]

    def _falling(self, logs: Mapping[str, float]) -> str | None:
        if "logps/chosen_change" not in logs:
            return None
        self.changes.append(logs["logps/chosen_change"])
        if len(self.changes) < 2 * self.window:
            return None
        values = list(self.changes)
        before, now = (sum(part) / self.window for part in (values[: self.window], values[self.window :]))
        if now >= self.falling or now >= before:
            return None
        return (
            f"the log-probs of chosen responses fall: {now:+.3f} nats a token against the reference over the last "
            f"{self.window} lines, {before:+.3f} before (threshold {self.falling:+.2f}); raise generation_weight or "
            "beta, or lower learning_rate"
        )

    def _equal(self, logs: Mapping[str, float]) -> str | None:
        if "rewards/std" not in logs or self.num_spreads == self.window:
            return None
        self.num_spreads += 1
        self.largest_spread = max(self.largest_spread, logs["rewards/std"])
        if self.num_spreads < self.window or self.largest_spread > self.noise:
            return None
        return (
            f"the rewards of all pairs are still equal after {self.window} lines (standard deviation at most "
            f"{self.largest_spread:.1e}, up to {self.noise:.1e} may be rounding), so nothing is learnt; check "
            "learning_rate and warm-up, what is frozen, and that weights trained without DeepSpeed are not bfloat16, "
            "which loses small updates"
        )

    def _repetition(self, logs: Mapping[str, float]) -> str | None:
        value = logs.get("eval_samples/repetition")
        if value is None:
            return None
        if self.first_repetition is None:
            self.first_repetition = value
        if value < self.first_repetition + self.repetition_rise:
            return None
        return (
            f"greedy answers repeat themselves: {value:.0%} of their 4-grams, {self.first_repetition:.0%} in the first "
            "samples; read samples.jsonl, and lower learning_rate or raise generation_weight"
        )


def rounding_noise(args: Any) -> float:
    """Return the standard deviation of rewards that is put down to rounding, where policy and reference are equal.

    Allowances for the errors of some hundred log-probs in a sum: half a nat in half precision, a hundredth of a nat in
    float32. Rewards are beta times that.

    Args:
        args: `MPOArguments`; `dtype` is that of the weights.
    """
    half = args.bf16 or args.fp16 or getattr(args, "dtype", "float32") != "float32"
    return args.beta * (0.5 if half else 0.01)


def expected_first_terms(args: Any) -> dict[str, tuple[float, str]]:
    """Return what terms of the first step should be, where policy and reference are one model, and that in words.

    Args:
        args: `MPOArguments`.

    Returns:
        By the name in the log; only terms that are used and have a fixed value. The generation term has none, nor has
        a preference term that compares nothing with the reference, nor one whose pairs are weighted.
    """
    terms = {}
    if args.wpo:
        return terms
    if args.preference not in REFERENCE_FREE:
        zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        pairs = Pairs(
            zero,
            zero,
            args.beta,
            label_smoothing=args.label_smoothing,
            policy_logps=(zero, zero),
            lengths=(one, one),
        )
        value = preference_term(args.preference, pairs).item()
        terms["loss_preference"] = (value, _FIRST_TERM.get(args.preference, "ln 2"))
    if args.quality == "bco":
        terms["loss_quality"] = (2 * math.log(2), "2 ln 2")
    return terms


_FIRST_TERM = {
    **dict.fromkeys(("rso", "hinge", "apo_zero", "apo_down"), "1"),
    "ipo": "1/(2 beta)^2",
    "sppo": "2/(2 beta)^2",
    "nca": "2 ln 2",
    "discopop": "(1 + ln 2)/2",
    "exo": "-ln(4 eps (1 - eps))/2",
}


def expected_first_loss(args: Any, generation: float) -> tuple[float | None, str]:
    """Return what the loss of the first step should be, where policy and reference are one model, and how it adds up.

    Args:
        args: `MPOArguments`.
        generation: the generation term as it was logged; it depends on the start model alone.

    Returns:
        The loss, or None where a term has no fixed value (ORPO, SimPO, WPO's weights), and the sum in words.
    """
    if args.wpo:
        return None, "the weights of the pairs depend on the start model, so it has no fixed value"
    if args.preference in REFERENCE_FREE and args.preference != "none":
        return None, f"{args.preference} depends on the start model alone, so it has no fixed value"
    weights = {"loss_preference": args.preference_weight, "loss_quality": args.quality_weight}
    total, words = 0.0, []
    for name, (value, spelled) in expected_first_terms(args).items():
        total += weights[name] * value
        words.append(f"{weights[name]:g} * {spelled}")
    if args.generation != "none":
        total += args.generation_weight * generation
        words.append(f"{args.generation_weight:g} * NLL of the chosen responses ({generation:.4f})")
    return total, " + ".join(words)
