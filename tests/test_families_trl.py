"""TRL's DPOTrainer sees the same tokens, pixels and first losses on the same rows, for families that it trains too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_families import FAMILIES

from internvl_mpo.encoding import encode_group
from internvl_mpo.families.native import content_parts
from internvl_mpo.families.registry import family_of_source
from internvl_mpo.logps import attach_scoring, response_logps
from internvl_mpo.objective import mpo_loss
from internvl_mpo.packing import pack_groups
from internvl_mpo.records import PreferencePair

trl = pytest.importorskip("trl")

# TRL scores what a template writes behind the end-of-turn token (Qwen's writes a line break, which no model generates);
# here the line break stands before the next turn instead.
TEMPLATE = (
    "{{% for message in messages %}}"
    "{{{{ '\n' if not loop.first else '' }}}}{{{{ '<|im_start|>' + message['role'] + '\n' }}}}"
    "{{% for part in message['content'] %}}"
    "{{% if part['type'] == 'image' %}}{mark}{{% else %}}{{{{ part['text'] }}}}{{% endif %}}"
    "{{% endfor %}}<|im_end|>{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '\n<|im_start|>assistant\n' }}}}{{% endif %}}"
)
PAIRS = (
    (("a.png",), "<image>\nWhich is it?", "the red one", "blue"),
    (("b.png", "a.png"), "<image>\nOr <image>\nrather?", "the second", "the first of them"),
    (("b.png",), "<image>\nHow many?", "7", "eight or nine"),
)


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory) -> tuple[Path, Any, list[PreferencePair]]:
    """A folder with model and pictures, its processor, pairs."""
    folder = tmp_path_factory.mktemp("world")
    FAMILIES[request.param](folder / "model")
    for name, size in (("a.png", (61, 29)), ("b.png", (58, 60))):
        Image.effect_noise(size, 90).convert("RGB").save(folder / name)
    processor = family_of_source(str(folder / "model")).load_processor(str(folder / "model"))
    mark = processor.image_token
    processor.chat_template = TEMPLATE.format(mark=f"<|vision_start|>{mark}" if "qwen" in request.param else mark)
    pairs = [
        PreferencePair(images=images, question=question, chosen=chosen, rejected=rejected)
        for images, question, chosen, rejected in PAIRS
    ]
    return folder, processor, pairs


def trl_row(pair: PreferencePair, folder: Path) -> dict[str, Any]:
    answers = {
        side: [{"role": "assistant", "content": [{"type": "text", "text": getattr(pair, side)}]}]
        for side in ("chosen", "rejected")
    }
    images = [Image.open(folder / name) for name in pair.images]
    return {"images": images, "prompt": [{"role": "user", "content": content_parts(pair.question)}], **answers}


def test_token_ids_and_pixels_are_trls(world):
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    folder, processor, pairs = world
    collate = DataCollatorForVisionPreference(processor)
    for pair in pairs:
        mine = encode_group(processor, [pair], folder)
        batch = collate([trl_row(pair, folder)])
        for number, index in enumerate(mine.pairs[0]):
            expected = mine.prompt_ids + mine.responses[index]
            assert batch["input_ids"][number][batch["attention_mask"][number].bool()].tolist() == expected
            assert int(batch["completion_mask"][number].sum()) == len(mine.responses[index])
        theirs = batch["pixel_values"]
        theirs = theirs.flatten(0, 1) if theirs.ndim == 5 else theirs  # padded to the picture of most tiles
        assert all(any(torch.equal(row, other) for other in theirs) for row in mine.tiles)


@pytest.mark.slow
def test_the_first_loss_is_trls(world, tmp_path):
    import datasets

    folder, processor, pairs = world
    family = family_of_source(str(folder / "model"))
    config = trl.DPOConfig(
        output_dir=str(tmp_path / "run"),
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        beta=0.1,
        max_length=None,
        per_device_train_batch_size=len(pairs),
        max_steps=1,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=family.load_model(str(folder / "model")),
        ref_model=family.load_model(str(folder / "model")),
        args=config,
        train_dataset=datasets.Dataset.from_list([trl_row(pair, folder) for pair in pairs]),
        processing_class=processor,
    )
    trainer.train()
    theirs = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    model = attach_scoring(family.load_model(str(folder / "model")))
    pack = pack_groups([encode_group(processor, [pair], folder) for pair in pairs])
    with torch.no_grad():
        logps_R = response_logps(model, pack)
    sides = logps_R[pack.chosen_index_P], logps_R[pack.rejected_index_P]
    options = {"beta": 0.1, "weights": (0.8, 0.2, 1.0), "generation": "sft_token"}
    ours = mpo_loss(*sides, *sides, pack.chosen_lengths_P, **options).loss
    assert float(ours) == pytest.approx(theirs, rel=1e-5)
