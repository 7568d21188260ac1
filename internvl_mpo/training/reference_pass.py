"""The start model looks at the pairs of a run: just ahead of the steps, before them, or as a job of its own.

    ahead    packs of the next steps are computed on the ranks that train, with the start model's weights in the place
             of the policy's; the first step waits for one window, not for the whole epoch
    before   all windows before the first step; no second copy of the weights is kept
    only     the same, a share of it if asked, and then the program is over

What is computed goes to a cache on disk, where the next epoch, the next run and other machines find it.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from internvl_mpo.logps import pair_logps
from internvl_mpo.objective import needs_reference
from internvl_mpo.packing import pack_groups
from internvl_mpo.steps import Rows
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.data import GroupDataset
from internvl_mpo.training.distributed import agree, from_all_ranks, inference_engine, zero_stage
from internvl_mpo.training.fsdp import uses_fsdp
from internvl_mpo.training.live_reference import StartWeights
from internvl_mpo.training.pairs import TrainingPairs
from internvl_mpo.training.policy import is_partitioned
from internvl_mpo.training.reference_cache import ReferenceCache
from internvl_mpo.training.reference_plan import ReferencePlan, Window
from internvl_mpo.training.signals import keep_from_signals
from internvl_mpo.training.speed import apply_speed_settings


class ReferencePass:
    """Fills the reference cache of a run; all ranks call its methods together."""

    def __init__(
        self, cache: ReferenceCache, processor: Any, pairs: TrainingPairs, held_out: TrainingPairs, args: MPOArguments
    ):
        """Nothing is computed yet.

        Args:
            cache: takes the results.
            processor: encodes pairs.
            pairs: those that are trained on.
            held_out: those that are evaluated on; may be empty.
            args: how much ahead, budget, precision, ranks.
        """
        self.cache, self.args, self.pairs, self.held_out = cache, args, pairs, held_out
        steps = pairs.total_steps(args) if needs_reference(args.preference, args.quality) else 0
        if args.reference_sync_steps:  # then the reference moves away from the start model
            steps = min(steps, args.reference_sync_steps)
        self.plan = ReferencePlan(pairs + held_out, args, num_steps=steps)
        self.data = GroupDataset(
            self.plan.pairs.rows,
            processor,
            max_tiles=args.max_tiles,
            max_length=args.max_length,
            token_weights=args.token_weights,
        )
        self.follows = False  # whether `follow` was called
        self.start: StartWeights | None = None  # as long as there is something to compute
        self.seconds = 0.0  # that windows took
        self._windows: Iterator[Window] | None = None
        self._next: Window | None = None
        self._held_out_left = bool(held_out)

    # --- before training ----------------------------------------------------------------------------------------------

    def is_complete(self) -> bool:
        """Whether every rank has the log-probs of all pairs that the run needs."""
        rows = (self.plan.rows(np.concatenate(questions)) for questions in self._all_questions())
        return not agree(not all(self.cache.has(self.plan.digests[some]).all() for some in rows), self.args)

    def before(self, model: nn.Module, *, share: tuple[int, int] = (0, 1)) -> None:
        """Compute all that is missing with the start model itself.

        Args:
            model: left in evaluation mode, on the device of this rank.
            share: i of n: only every n-th pack, from the i-th on.
        """
        numbers = itertools.count()

        def mine(questions: list[np.ndarray]) -> list[list[Rows]]:  # by the plan, whatever others have done already
            chosen = [p for p in self.plan.packs(questions) if next(numbers) % share[1] == share[0]]
            return self._missing(chosen, refresh=False)

        num_pairs = sum(_num_pairs(mine(questions)) for questions in self._all_questions())
        if not num_pairs:
            return
        apply_speed_settings(model, self.args)
        if not is_partitioned(model):
            model.to(self.args.device)
        model.eval()
        numbers = itertools.count()
        with inference_engine(model, self.args) as engine, self._bar(num_pairs // self.args.world_size) as bar:
            for questions in self._all_questions():
                if left := mine(questions):
                    self._compute(engine, left, bar)

    def _all_questions(self) -> Iterator[list[np.ndarray]]:
        """Those of all windows, and of what is held out, step by step."""
        for window in self.plan.windows(self.pairs):
            yield window.questions
        yield [self.plan.others(self.pairs)]

    # --- while training runs ------------------------------------------------------------------------------------------

    def follow(self, model: nn.Module) -> None:
        """Keep the weights of the start model, if anything is missing, before the first step changes them.

        Args:
            model: the policy, not wrapped, before a checkpoint is loaded. Under FSDP2 nothing is done before it is cut
                in pieces, so that each rank keeps its own.
        """
        if uses_fsdp(self.args) and not is_partitioned(model):
            return
        self.follows = True
        if not self.is_complete():
            self.start = StartWeights(model)
            self._windows = self.plan.windows(self.pairs)

    def prepare(self, step: int, go_on: Callable[[], bool] = lambda: True) -> bool:
        """Compute what the step needs, and with it what its window needs; say whether it is all there.

        Args:
            step: 0 is the first of the run.
            go_on: asked before each round of packs; False leaves the rest for the next start.
        """
        while self._windows is not None:
            self._next = self._next or next(self._windows, None)
            if self._next is None:
                self._windows = None
                self._let_go()
            elif self._next.first > step:
                return True
            else:  # windows that a resumed run has left behind too: their questions may come up again
                steps = f"steps {self._next.first + 1} to {self._next.end}"
                if not self._with_start_weights(self._next.questions, steps, go_on):
                    return False
                self._next = None
        return True

    def prepare_held_out(self) -> None:
        """Compute what an evaluation needs, once."""
        if self._held_out_left and self.start is not None:
            self._with_start_weights([self.plan.others(self.pairs)], "held-out pairs", lambda: True)
        self._held_out_left = False
        self._let_go()

    def _let_go(self) -> None:
        if self._windows is None and not self._held_out_left:
            self.start = None

    def _with_start_weights(self, questions: list[np.ndarray], what: str, go_on: Callable[[], bool]) -> bool:
        started = time.perf_counter()
        packs = self._missing(self.plan.packs(questions), refresh=True)
        done = True
        if packs:
            num_pairs = _num_pairs(packs) // self.args.world_size
            with self.start.in_place() as model, self._bar(num_pairs, f"reference log-probs, {what}") as bar:
                done = self._compute(model, packs, bar, go_on)
        self.seconds += time.perf_counter() - started
        return done

    # --- the work -----------------------------------------------------------------------------------------------------

    def _missing(self, packs: Sequence[list[Rows]], *, refresh: bool) -> list[list[Rows]]:
        """Return the packs that hold a pair without log-probs, as the first rank knows it; all ranks know the others.

        Args:
            packs: any.
            refresh: whether shards that other programs have written since are looked at.
        """
        if refresh and self.args.process_index == 0:
            self.cache.refresh()
        rows = [[row for group in pack for row in group] for pack in packs]
        known = [bool(self.cache.has(self.plan.digests[members]).all()) for members in rows]
        if self.args.world_size > 1:
            there = [row for members, done in zip(rows, known, strict=True) if done for row in members]
            values = self.cache.values(self.plan.digests[there]) if refresh else None
            known, there, values = agree((known, there, values), self.args)
            if refresh:
                self.cache.take(self.plan.digests[there], values)
        return [pack for pack, done in zip(packs, known, strict=True) if not done]

    def _compute(
        self, model: nn.Module, packs: Sequence[list[Rows]], bar: Any, go_on: Callable[[], bool] = lambda: True
    ) -> bool:
        """Compute packs, each rank a share; every rank knows all results then and has written its own."""
        args = self.args
        mine = packs[args.process_index :: args.world_size]
        # With partitioned weights all ranks must call the model equally often: the last round is filled up.
        num_turns, is_filled = math.ceil(len(packs) / args.world_size), is_partitioned(model)
        loader = iter(self._load([*mine, packs[0]] if is_filled else mine))
        done, found = True, []
        autocast = torch.bfloat16 if args.bf16 else torch.float16
        with (
            self.cache,
            torch.no_grad(),
            torch.autocast(args.device.type, autocast, enabled=(args.bf16 or args.fp16) and zero_stage(args) is None),
        ):
            for turn in range(num_turns):
                if not go_on():
                    done = False
                    break
                if turn >= len(mine) and not is_filled:
                    continue
                pack = next(loader).to(args.device)
                logps = pair_logps(model, pack)
                if turn < len(mine):
                    found.append(self.cache.add(pack.pair_ids, *logps))
                    bar.update(pack.num_pairs)
        if args.world_size > 1:
            for part in from_all_ranks(found, args):
                for digests, values in part:
                    self.cache.take(digests, values)
        return done

    def _load(self, packs: Sequence[list[Rows]]) -> DataLoader:
        """Encoded packs, in order. Its own generator keeps the random numbers of the run where they are."""
        return DataLoader(
            self.data,
            batch_sampler=packs,
            collate_fn=pack_groups,
            num_workers=min(self.args.dataloader_num_workers, len(packs)),
            worker_init_fn=keep_from_signals,
            generator=torch.Generator(),
        )

    def _bar(self, num_pairs: int, what: str = "reference log-probs") -> Any:
        from tqdm import tqdm

        return tqdm(total=num_pairs, desc=what, unit="pair", leave=False, disable=self.args.process_index != 0)


def _num_pairs(packs: Sequence[list[Rows]]) -> int:
    return sum(len(group) for pack in packs for group in pack)
