"""How much each response token counts in the log-ratios of a pair, for losses that do not trust all tokens alike.

    chosen      t  h  e  2  a  n  d  .  end            first difference at 2 | 3
    rejected    t  h  e  3  a  n  d  m  o  r  e  end
    LD-DPO      1  1  1  1  1  1  1  1  1  a  a  a     a = ld_alpha, from where the shorter response has ended
    difference  1  1  1  1  1  w  w  w  w  w  w  w     w = after_difference, here from two tokens after the difference

`ld_alpha` below 1 takes the length out of the preference (LD-DPO, arXiv 2409.06411). `after_difference` below 1 puts it
into the step in which the responses part, as Step-DPO (arXiv 2406.18629) does with labelled steps: what follows a wrong
step may be right in itself, and need not be unlearned with it. Both weights are multiplied. The weights are those of a
pair, so a response that several pairs share has several; the generation term does not see them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from internvl_mpo.packing import Group, num_common


@dataclass(frozen=True)
class TokenWeights:
    """What decides the weights.

    Attributes:
        ld_alpha: weight of the tokens beyond the length of the shorter response, 0 to 1.
        after_difference: weight of the tokens after the step in which the responses first differ, 0 to 1.
        difference_tokens: length of that step, from the first token that differs; 1 or more.
    """

    ld_alpha: float = 1.0
    after_difference: float = 1.0
    difference_tokens: int = 16

    @property
    def are_equal(self) -> bool:
        """Whether every token weighs 1."""
        return self.ld_alpha == self.after_difference == 1

    def identity(self) -> dict[str, Any]:
        """Return what sums over tokens depend on, JSON-able; empty where every token weighs 1."""
        return {} if self.are_equal else {"token_weights": asdict(self)}

    def weigh(self, group: Group) -> Group:
        """Return the group with a weight for each token of each pair; as it is where every token weighs 1."""
        if self.are_equal:
            return group
        responses = group.responses
        return replace(group, token_weights=[self.of(responses[c], responses[r]) for c, r in group.pairs])

    def of(self, chosen: Sequence[int], rejected: Sequence[int]) -> tuple[list[float], list[float]]:
        """Return the weights of the tokens of two responses.

        Args:
            chosen: token ids.
            rejected: token ids.
        """
        shared = min(len(chosen), len(rejected))
        step_end = num_common(chosen, rejected) + self.difference_tokens

        def weight(place: int) -> float:
            return (self.ld_alpha if place >= shared else 1.0) * (self.after_difference if place >= step_end else 1.0)

        return list(map(weight, range(len(chosen)))), list(map(weight, range(len(rejected))))
