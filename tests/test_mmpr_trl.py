"""The Parquet form trains unchanged in TRL, and TRL sees the tokens that this package's trainer sees."""

import datasets
import pytest
import torch
from tiny import tiny_model, tiny_processor

from internvl_mpo.encoding import encode_group
from internvl_mpo.mini.release import MMPRSettings, make_release
from internvl_mpo.mmpr.card import write_card
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.mmpr.shard_plan import Options
from internvl_mpo.publish import write_model_folder
from modeling_internvl_mpo import InternVLChatModel

trl = pytest.importorskip("trl")

# One picture with and without a placeholder, two pictures inside the text, none.
SUBSETS = ("CLEVR_math_digits_pairs_vqa_correctness_rules", "vqav2_digits_prefix_pair_sr0.5_wo_image")
SUBSETS += ("nlvr2_digits_ov_pairs_vqa_correctness_rules", "geos_text_pairs_vqa_correctness_rules")


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("trl")
    make_release(MMPRSettings(output=str(folder / "raw"), num_pictures=2, pairs_per_picture=1))
    convert(Options(str(folder / "raw")), folder / "parquet")
    write_card(folder / "parquet")
    return str(folder / "parquet")


@pytest.mark.slow
def test_dpo_trainer_learns_from_the_columns_as_they_are(parquet, tmp_path):
    torch.manual_seed(0)
    pairs = datasets.load_dataset(parquet, split="train", cache_dir=str(tmp_path / "cache"))
    folder = write_model_folder(tiny_model(), tiny_processor(), tmp_path / "model")  # TRL reads the reference from it
    model = InternVLChatModel.from_pretrained(folder)
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "run"),
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        beta=0.1,
        max_length=None,
        per_device_train_batch_size=7,
        max_steps=6,
        learning_rate=1e-2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    processor = tiny_processor(model.config)
    trainer = trl.DPOTrainer(model=model, args=config, train_dataset=pairs, processing_class=processor)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 6
    assert steps[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert steps[-1]["rewards/margins"] > 0
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_the_tokens_trl_makes_are_those_of_this_trainer(parquet, tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    processor = tiny_processor(tiny_model().config)
    rows = {row.pair.id: row for row in iter_pairs(parquet)}
    pairs = datasets.load_dataset(parquet, split="train", cache_dir=str(tmp_path / "cache"))
    collate = DataCollatorForVisionPreference(processor)
    compared = set()
    for example in pairs:
        if example["subset"] not in SUBSETS:
            continue
        row = rows[example["id"]]
        mine = encode_group(processor, [row.pair], row.image_root, max_tiles=4, max_length=4000)
        batch = collate([dict(example)])
        prompts = [mine.prompt_ids + mine.responses[index] for index in mine.pairs[0]]
        for ids, mask, scored, expected in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], prompts, strict=True
        ):
            assert ids[mask.bool()].tolist() == expected
            assert int(scored.sum()) == len(expected) - len(mine.prompt_ids)
        tiles = batch.get("pixel_values")
        if mine.tiles is not None:
            assert torch.equal(tiles, torch.cat([mine.tiles, mine.tiles]))
        compared.add(example["subset"])
    assert compared == set(SUBSETS)
