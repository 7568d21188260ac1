"""What is measured on pairs that are not trained on: rewards against plain formulas, answers against plain generation.

pytest tests/test_held_out.py
"""

import math
from types import SimpleNamespace

import pytest
import torch
from test_trainer_built import as_rank, pairs, settings  # noqa: F401 - pairs is a fixture
from tiny import tiny_model, tiny_processor

from internvl_mpo.encoding import encode_group
from internvl_mpo.logps import attach_scoring, score_pairs
from internvl_mpo.pack_plan import fill_packs
from internvl_mpo.packing import Pack, pack_groups
from internvl_mpo.training import held_out as module
from internvl_mpo.training.data import GroupDataset
from internvl_mpo.training.held_out import HeldOut, greedy_answers, repetition, sample_means, send_samples
from internvl_mpo.training.meters import MeanMeter


class Rank:
    """Stands for accelerate on one rank: keeps its sums, so that those of several can be added up."""

    device = torch.device("cpu")

    def __init__(self):
        self.sums = None

    def reduce(self, sums, reduction):
        assert reduction == "sum"
        self.sums = sums
        return sums


def reference_logps(pack) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs that follow from the pair alone; of some pairs the chosen response gained more, of some the other."""
    numbers = [int(pair_id[:2], 16) for pair_id in pack.pair_ids]
    rejected = [-100.0 - number * (5 if number % 2 else -0.2) for number in numbers]
    return torch.tensor([-100.0 - number for number in numbers]), torch.tensor(rejected)


def held(pairs, tmp_path, rank=0, num_ranks=1, **more) -> HeldOut:
    args = as_rank(settings(tmp_path, **more), rank, num_ranks)
    dataset = GroupDataset(pairs.rows, tiny_processor(), max_tiles=4, max_length=900, token_weights=args.token_weights)
    return HeldOut(pairs, dataset, args, collate=pack_groups, reference_logps=reference_logps)


@pytest.fixture(scope="module")
def plain(pairs) -> dict[str, list[float]]:
    """What each pair gives, one at a time and written out."""
    model, rows = attach_scoring(tiny_model()), []
    for row in pairs.rows:
        group = encode_group(tiny_processor(), [row.pair], row.image_root, max_tiles=4, max_length=900)
        pack = pack_groups([group])
        with torch.no_grad():
            scores = score_pairs(model, pack)
        chosen, rejected = scores.chosen.item(), scores.rejected.item()
        known_chosen, known_rejected = (value.item() for value in reference_logps(pack))
        lengths = len(group.responses[group.pairs[0][0]]), len(group.responses[group.pairs[0][1]])
        changes = chosen - known_chosen, rejected - known_rejected
        rows.append({
            "eval_rewards/accuracy": float(changes[0] > changes[1]),
            "eval_rewards/margin": 0.5 * (changes[0] - changes[1]),
            "eval_nll": -chosen / lengths[0],
            "eval_logps/chosen_change": changes[0] / lengths[0],
            "eval_logps/rejected_change": changes[1] / lengths[1],
        })  # fmt: skip
    assert 0 < sum(row["eval_rewards/accuracy"] for row in rows) < len(rows)
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} | {"eval_num_pairs": len(rows)}


@pytest.mark.parametrize("budget", [1, 560, 5000])
def test_numbers_on_held_out_pairs_are_means_over_pairs_however_they_are_packed(pairs, tmp_path, plain, budget):
    one, model = held(pairs, tmp_path, max_tokens_per_pack=budget), attach_scoring(tiny_model())
    packed = []
    one.collate = lambda groups: packed.append(sum(group.num_tokens for group in groups)) or pack_groups(groups)
    assert one.rewards(model, Rank(), "eval") == pytest.approx(plain, rel=1e-4)
    largest = int(pairs.column("num_tokens").max())
    assert max(packed) <= max(budget, largest)
    assert {1: len(packed) > 5, 5000: len(packed) == 1}.get(budget, 1 < len(packed) < 12)
    assert set(one.rewards(model, Rank(), "test")) == {name.replace("eval", "test", 1) for name in plain}


def test_several_ranks_share_the_packs_and_one_that_only_fills_a_round_counts_nothing(pairs, tmp_path, plain):
    ranks, calls = [Rank() for _ in range(3)], []
    model = attach_scoring(tiny_model())
    for number, rank in enumerate(ranks):
        one = held(pairs, tmp_path, number, 3, max_tokens_per_pack=900)
        packed = []
        one.collate = lambda groups, packed=packed: packed.append(groups) or pack_groups(groups)
        one.rewards(model, rank, "eval")
        calls.append(len(packed))
    assert len(set(calls)) == 1, "sharded models meet in the same collectives"
    assert sum(calls) > len(fill_packs(pairs.column("num_tokens").tolist(), 900)), "some only fill a round"
    *totals, num_pairs, _, _ = (sum(column) for column in zip(*(rank.sums.tolist() for rank in ranks), strict=True))
    assert num_pairs == 12
    means = [total / num_pairs for total in totals]
    assert means == pytest.approx([value for name, value in plain.items() if name != "eval_num_pairs"], rel=1e-4)


def test_packs_are_brought_to_the_device_of_the_run(pairs, tmp_path, monkeypatch):
    one, devices = held(pairs, tmp_path), []
    monkeypatch.setattr(Pack, "to", lambda self, device: devices.append(device) or self)
    one.rewards(attach_scoring(tiny_model()), Rank(), "eval")
    assert set(devices) == {one.args.device}


def test_rewards_keep_no_gradients(pairs, tmp_path, monkeypatch):
    model, seen = attach_scoring(tiny_model()), []
    monkeypatch.setattr(
        module, "score_pairs", lambda *given: seen.append(torch.is_grad_enabled()) or score_pairs(*given)
    )
    held(pairs, tmp_path).rewards(model, Rank(), "eval")
    assert set(seen) == {False}


# --- answers ----------------------------------------------------------------------------------------------------------


def plain_answer(model, processor, row, limit: int) -> list[int]:
    """Greedy decoding written out: the likeliest token, again and again."""
    group = encode_group(processor, [row.pair], row.image_root, max_tiles=4, max_length=900)
    ids, tiles = list(group.prompt_ids), group.tiles
    for _ in range(limit):
        more = {} if tiles is None or not len(tiles) else {"pixel_values": torch.as_tensor(tiles)}
        if more:
            more["image_flags"] = torch.ones(len(tiles), 1)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **more).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == model.generation_config.eos_token_id:
            break
    return ids[len(group.prompt_ids) :]


def test_greedy_answers_are_the_likeliest_tokens_one_after_another(pairs, tmp_path):
    model, processor = tiny_model(), tiny_processor()
    one = held(pairs, tmp_path)
    found = greedy_answers(model, [one.dataset[(0,)], one.dataset[(4,)]], 3)
    assert found == [plain_answer(model, processor, pairs.rows[number], 3) for number in (0, 4)]
    assert [len(ids) for ids in found] == [3, 3]


@pytest.mark.parametrize(
    ("count", "asked"), [(1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (4, [0, 3, 6, 9]), (9, [0, 3, 6, 9]), (0, [])]
)
def test_questions_that_are_answered_lie_over_all_of_the_data_and_none_comes_twice(
    pairs,
    tmp_path,
    monkeypatch,
    count,
    asked,
):
    one, given = held(pairs, tmp_path, num_eval_samples=count, eval_sample_tokens=3), []

    def greedy(model, groups, limit):
        given.append((model, [group.pair_ids for group in groups], limit))
        return [[5] * (2 + number % 2) for number in range(len(groups))]

    def decode(ids, skip_special_tokens):
        return f"{len(ids)} tokens" if skip_special_tokens else None

    monkeypatch.setattr(module, "greedy_answers", greedy)
    found = one.answers("model", SimpleNamespace(decode=decode), 7)
    assert given == [("model", [[pairs.rows[number].pair.id] for number in asked], 3)]
    for turn, (number, row) in enumerate(zip(asked, found, strict=True)):
        pair = pairs.rows[number].pair
        assert row == {
            "step": 7, "images": list(pair.images), "question": pair.question, "answer": f"{2 + turn % 2} tokens",
            "chosen": pair.chosen, "num_tokens": 2 + turn % 2, "finished": turn % 2 == 0, "repetition": 0.0,
        }  # fmt: skip


@pytest.mark.parametrize(
    ("bf16", "fp16", "dtype"),
    [(False, False, None), (True, False, torch.bfloat16), (False, True, torch.float16)],
)
def test_answers_are_sampled_in_the_precision_of_training(pairs, tmp_path, monkeypatch, bf16, fp16, dtype):
    one, seen = held(pairs, tmp_path), []
    one.args.bf16, one.args.fp16 = bf16, fp16

    def greedy(*given):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return [[1]] * len(given[1])

    monkeypatch.setattr(module, "greedy_answers", greedy)
    one.answers("model", SimpleNamespace(decode=lambda ids, **more: ""), 1)
    assert seen == [dtype]


def test_means_over_answers_and_repetition_are_shares():
    samples = [
        {"num_tokens": 4, "finished": True, "repetition": 0.0},
        {"num_tokens": 8, "finished": False, "repetition": 0.75},
        {"num_tokens": 3, "finished": False, "repetition": 0.75},
    ]
    means = {"eval_samples/length": 5.0, "eval_samples/unfinished": 2 / 3, "eval_samples/repetition": 0.5}
    assert sample_means(samples, "eval") == means
    assert sample_means([], "eval") == {}
    assert repetition([1, 2, 1, 2, 1, 2]) == pytest.approx(1 / 3)
    assert repetition([1, 1, 1, 1]) == 0.0
    assert repetition([1, 1, 1], size=2) == 0.5
    assert repetition([]) == 0.0


class Tracker:
    """Any tracker: remembers what it is told."""

    def __init__(self):
        self.told = []
        self.tb_writer = self._wandb = self._trackio = self
        self.context_vars = SimpleNamespace(current_run=SimpleNamespace(get=lambda: self))

    def add_text(self, *given):
        self.told.append(given)

    def log(self, *given):
        self.told.append(given)

    def Table(self, **given):
        return given


SAMPLES = [
    {"question": "1+1?", "answer": "3", "chosen": "2", "repetition": 0.25, "step": 7},
    {"question": "2+2?", "answer": "4", "chosen": "4", "repetition": 0.0, "step": 7},
]
ROWS = [[7, "1+1?", "3", "2", 0.25], [7, "2+2?", "4", "4", 0.0]]
COLUMNS = ["step", "question", "answer", "chosen", "repetition"]


def test_each_tracker_gets_the_samples_in_its_own_form():
    trackers = [type(name, (Tracker,), {})() for name in ("TensorBoardCallback", "WandbCallback", "TrackioCallback")]
    send_samples([*trackers, type("AnotherCallback", (Tracker,), {})()], SAMPLES, 7)
    board, wandb, trackio = (tracker.told for tracker in trackers)
    one, other = (f"**question** {row[1]}\n\n**answer** {row[2]}\n\n**chosen** {row[3]}" for row in ROWS)
    assert board == [("eval/samples", f"{one}\n\n---\n\n{other}", 7)]
    assert wandb == [({"eval/samples": {"columns": COLUMNS, "data": ROWS}, "train/global_step": 7},)]
    ((sent,),) = trackio
    frame = sent["eval/samples"]["dataframe"]
    assert (list(frame.columns), frame.values.tolist()) == (COLUMNS, ROWS)


def test_a_tracker_that_is_not_there_is_passed_over():
    board, wandb, trackio = (
        type(name, (Tracker,), {})() for name in ("TensorBoardCallback", "WandbCallback", "TrackioCallback")
    )
    board.tb_writer, wandb._wandb = None, None
    trackio.context_vars.current_run.get = lambda: None
    send_samples([board, wandb, trackio], SAMPLES, 7)
    assert board.told + wandb.told + trackio.told == []


def test_a_meter_adds_up_what_is_counted_and_nothing_of_an_empty_pack():
    meter = MeanMeter()
    meter.add(2, {"a": torch.tensor([1.0, 2.0])})
    meter.add(0, {"a": torch.tensor([])})
    meter.add(1, {"a": torch.tensor([2.0**-30])})
    assert meter.reduce(Rank()) == {"a": (3 + 2.0**-30) / 3, "num_pairs": 3, "num_tokens": 0, "flop": 0.0}
    assert math.isclose(meter.totals["a"].item(), 3 + 2.0**-30, rel_tol=0)
