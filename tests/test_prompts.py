"""What the model reads."""

import pytest

from internvl_mpo.errors import BadInputError
from internvl_mpo.prompts import STYLES, ask, has_options, language_of, strip_answer_instruction, style_for


def test_cot_is_the_published_prompt_byte_for_byte():
    assert ask("How many?", "cot") == (
        "Your task is to answer the question below. Give step by step reasoning before you answer, and when you're "
        'ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\nHow many?'
    )


def test_lone_image_goes_to_the_front_and_several_stay():
    assert ask("How many?\n<image>", "cot").startswith("<image>\nYour task is")
    assert ask("How many?\n<image>", "cot").count("<image>") == 1
    several = "Image-1: <image>\nImage-2: <image>\nSame?"
    assert several in ask(several, "cot")


@pytest.mark.parametrize(
    "instruction",
    [
        "\nAnswer the question using a single word or phrase.",
        "\nPlease answer the question using a single word or phrase.",
        "\nAnswer with the option's letter from the given choices directly.",
        " Please answer yes or no.",
        " Answer with Yes or No.",
        "\nPlease put your final answer in \\boxed{}.",
        "\n请用一个词或短语回答问题。",
        "\n请直接回答选项字母。",
    ],
)
def test_short_answer_instruction_is_taken_off(instruction):
    assert strip_answer_instruction("Is it red?" + instruction) == "Is it red?"
    assert instruction.strip() not in ask("Is it red?" + instruction, "cot")


def test_a_question_about_words_is_left_alone():
    for question in ("What is the word or phrase on the sign?", "Did he answer yes or no to the judge yesterday?"):
        assert strip_answer_instruction(question) == question


def test_options_survive_and_choose_the_direct_instruction():
    question = "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    assert has_options(question)
    assert ask(question, "direct").endswith("B. blue\nAnswer with the option's letter from the given choices directly.")
    assert ask("Which?", "direct").endswith("Which?\nAnswer the question using a single word or phrase.")


def test_plain_changes_nothing():
    question = " <image> Which?\nAnswer the question using a single word or phrase. "
    assert ask(question, "plain") == question


def test_chinese_question_gets_a_chinese_prompt():
    assert language_of("图中有几只猫？") == "zh"
    assert "答案:" in ask("图中有几只猫？", "cot")
    assert "Final answer" in ask("图中有几只猫？", "cot", "en")


def test_braces_in_a_question_are_text():
    assert "\\frac{1}{2} {x}" in ask("What is \\frac{1}{2} {x}?", "boxed")


@pytest.mark.parametrize("style", sorted(STYLES))
def test_every_style_holds_the_question_in_both_languages(style):
    for language in ("en", "zh"):
        assert "How many dogs?" in ask("How many dogs?", style, language)


def test_unknown_style_names_the_known_ones():
    with pytest.raises(BadInputError, match="expected one of plain, direct, cot"):
        ask("Why?", "chain")


def test_style_by_source_mixes_plain_cot_with_the_fitting_one():
    drawn = {style_for(f"q{i}", "scienceqa_train", ["by_source"], seed=0) for i in range(40)}
    assert drawn == {"cot", "background"}
    assert {style_for(f"q{i}", "geo170k", ["by_source"], seed=0) for i in range(40)} == {"cot"}
