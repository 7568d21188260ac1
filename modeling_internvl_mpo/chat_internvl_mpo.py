"""`chat` and `batch_chat`: the vendor's calls, with the vendor's arguments.

Letters: I tiles of all images, S side of a tile.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from .conversation_internvl_mpo import IMAGE_PLACEHOLDER, IMG_CONTEXT, IMG_END, IMG_START
from .tokenization_internvl_mpo import decode_answers, find_control_token


class Chat:
    """What a model needs to be asked questions in words; see `InternVLChatModel`."""

    conv_template: Any
    system_message: str | None
    num_image_token: int

    def chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None,
        history: list[tuple[str, str]] | None = None,
        return_history: bool = False,
        num_patches_list: list[int] | None = None,
        IMG_START_TOKEN: str = IMG_START,
        IMG_END_TOKEN: str = IMG_END,
        IMG_CONTEXT_TOKEN: str = IMG_CONTEXT,
        verbose: bool = False,
    ) -> Any:
        r"""Answer one question; the official signature and behaviour.

        Args:
            tokenizer: of the checkpoint.
            pixel_values: (I, 3, S, S) tiles of all images of the whole conversation, or None.
            question: `<image>\n` is put in front when there are tiles, no history, and no `<image>` in it.
            generation_config: keywords of `generate`, a `GenerationConfig`, or None for the model's own; the template's
                end of turn replaces its `eos_token_id`.
            history: earlier (question, answer) pairs; extended in place.
            return_history: also return the history.
            num_patches_list: tiles per image; None means that one image has them all.
            IMG_START_TOKEN: written before an image's tokens.
            IMG_END_TOKEN: written after them.
            IMG_CONTEXT_TOKEN: written once per image token.
            verbose: print prompt and answer.

        Returns:
            The answer, or (answer, history); with `num_return_sequences` above 1 a list of answers, with
            `return_dict_in_generate` what `generate` returns.

        Raises:
            ValueError: tiles, `num_patches_list` and `<image>` placeholders do not fit together, a text spells out a
                control token, or a history is asked of several answers or of none.
        """
        settings = _settings(generation_config)
        several = _num_answers(settings) > 1 or settings.get("return_dict_in_generate")
        if several and (history is not None or return_history):
            raise ValueError("a history takes one answer; leave out num_return_sequences and return_dict_in_generate")
        if history is None and pixel_values is not None and IMAGE_PLACEHOLDER not in question:
            question = f"{IMAGE_PLACEHOLDER}\n{question}"
        if num_patches_list is None:
            num_patches_list = [] if pixel_values is None else [len(pixel_values)]
        _check_tile_counts(pixel_values, num_patches_list)
        history = [] if history is None else history
        tokens = (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN)
        turns = [*history, (question, None)]
        prompt = self._render(turns)
        expanded = self._render(self._with_images(tokenizer, turns, num_patches_list, tokens))
        inputs = tokenizer([expanded], return_tensors="pt")
        answers = self._answer(tokenizer, inputs, pixel_values, settings, IMG_CONTEXT_TOKEN)
        answer = answers[0] if isinstance(answers, list) else answers
        if not several:
            history.append((question, answer))
        if verbose:
            print(prompt, answer)
        return (answer, history) if return_history else answer

    def batch_chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        questions: list[str],
        generation_config: dict[str, Any] | GenerationConfig | None,
        num_patches_list: Sequence[int | Sequence[int]] | None = None,
        history: None = None,
        return_history: bool = False,
        IMG_START_TOKEN: str = IMG_START,
        IMG_END_TOKEN: str = IMG_END,
        IMG_CONTEXT_TOKEN: str = IMG_CONTEXT,
        verbose: bool = False,
        image_counts: Sequence[int | Sequence[int]] | None = None,
    ) -> Any:
        """Answer several single-turn questions; the official signature.

        Arguments and results, one per question, are those of `chat`. `num_patches_list` has the tiles of every
        question's image: a number, 0 for no image, or a list with a number for each of several images; `image_counts`
        is its former name. Sets `tokenizer.padding_side` to left, as the original does.

        Raises:
            NotImplementedError: history was given or asked for.
            ValueError: as for `chat`.
        """
        if history is not None or return_history:
            raise NotImplementedError("batch_chat has no history; call chat for conversations of several turns")
        num_patches_list = image_counts if num_patches_list is None else num_patches_list
        if pixel_values is not None and num_patches_list is None:
            raise ValueError("give num_patches_list, the number of tiles of every question's image")
        if num_patches_list is not None and len(num_patches_list) != len(questions):
            raise ValueError(f"num_patches_list has {len(num_patches_list)} entries for {len(questions)} questions")
        counts = [_tiles_of(entry) for entry in num_patches_list or [0] * len(questions)]
        _check_tile_counts(pixel_values, [count for entry in counts for count in entry])
        tokens = (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN)
        prompts = []
        for question, tiles in zip(questions, counts, strict=True):
            if tiles and IMAGE_PLACEHOLDER not in question:
                question = f"{IMAGE_PLACEHOLDER}\n" * len(tiles) + question
            prompts.append(self._render(self._with_images(tokenizer, [(question, None)], tiles, tokens)))
        tokenizer.padding_side = "left"
        inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        answers = self._answer(tokenizer, inputs, pixel_values, _settings(generation_config), IMG_CONTEXT_TOKEN)
        if verbose and isinstance(answers, list):
            for prompt, answer in zip(prompts, answers, strict=True):
                print(prompt, answer)
        return answers

    def _render(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """Return the prompt of (question, answer) turns; the last answer is None."""
        if self.conv_template is None:
            raise ValueError("config.template is not set; set it to the conversation template the model was trained on")
        messages = [message for turn in turns for message in zip(("user", "assistant"), turn, strict=True)]
        return self.conv_template.render(messages, self.system_message)

    def _without_end(self, answer: str | None) -> str | None:
        sep = self.conv_template.sep.strip()
        return answer.rstrip()[: -len(sep)] if answer and sep and answer.rstrip().endswith(sep) else answer

    def _with_images(
        self,
        tokenizer: Any,
        turns: Sequence[tuple[str, str | None]],
        num_tiles: Sequence[int],
        tokens: tuple[str, str, str],
    ) -> list[tuple[str, str | None]]:
        """Put image tokens in the place of `<image>`: the last images into the newest turn that asks for them.

        In an earlier question an `<image>` inside a sentence is a word. Surplus placeholders stay text, as in the
        original. One end token after an earlier answer is taken off: models and logs leave it there.
        """
        turns = [(question, self._without_end(answer)) for question, answer in turns]
        for text in (text for turn in turns for text in turn if text):
            token = find_control_token(tokenizer, text)
            if token is not None:
                raise ValueError(f"the text spells out the control token {token}; take it out or spell it otherwise")
        start, context, end = tokens
        waiting, filled = list(num_tiles), []
        for number, (question, answer) in enumerate(reversed(turns)):
            parts = _at_places(question, in_sentences=number == 0)
            mine = waiting[max(0, len(waiting) - (len(parts) - 1)) :] if len(parts) > 1 else []
            del waiting[len(waiting) - len(mine) :]
            spans = [start + context * self.num_image_token * count + end for count in mine]
            spans += [IMAGE_PLACEHOLDER] * (len(parts) - 1 - len(mine))
            text = "".join(part + span for part, span in zip(parts, [*spans, ""], strict=True))
            filled.append((text, answer))
        if waiting:
            places = len(num_tiles) - len(waiting)
            raise ValueError(
                f"{len(num_tiles)} images for {places} {IMAGE_PLACEHOLDER} placeholders; write one per image into the "
                "question, or on a line of its own into the earlier question that it belongs to"
            )
        return filled[::-1]

    def _answer(
        self,
        tokenizer: Any,
        inputs: Any,
        pixel_values: torch.Tensor | None,
        settings: dict[str, Any],
        image_token: str,
    ) -> Any:
        """Generate for tokenised prompts and cut every answer at the template's separator."""
        sep = self.conv_template.sep.strip()
        self.img_context_token_id = tokenizer.convert_tokens_to_ids(image_token)
        settings["eos_token_id"] = tokenizer.convert_tokens_to_ids(sep)
        input_ids = inputs["input_ids"].to(self.device)
        output = self.generate(
            input_ids=input_ids,
            attention_mask=inputs["attention_mask"].to(self.device),
            pixel_values=pixel_values,
            **settings,
        )
        if not isinstance(output, torch.Tensor):
            return output
        answers = decode_answers(tokenizer, output[:, input_ids.shape[1] :])
        answers = [answer.split(sep)[0].strip() for answer in answers]
        each = len(answers) // len(input_ids)
        return answers if each == 1 else [answers[row : row + each] for row in range(0, len(answers), each)]


def _settings(generation_config: dict[str, Any] | GenerationConfig | None) -> dict[str, Any]:
    """Return keywords of `generate`; the caller's own dict is filled, as by the original.

    Raises:
        ValueError: neither keywords nor a `GenerationConfig`.
    """
    if generation_config is None:
        return {}
    if isinstance(generation_config, GenerationConfig):
        return {"generation_config": generation_config}
    if isinstance(generation_config, dict):
        return generation_config
    raise ValueError(
        f"generation_config is {type(generation_config).__name__}; give a dict, a GenerationConfig or None"
    )


def _num_answers(settings: dict[str, Any]) -> int:
    given = settings.get("generation_config")
    number = settings.get("num_return_sequences") or getattr(given, "num_return_sequences", None)
    if getattr(given, "return_dict_in_generate", None):
        settings.setdefault("return_dict_in_generate", True)
    return number or 1


def _tiles_of(entry: int | Sequence[int]) -> list[int]:
    """Return the tiles of each image of a question; 0 is no image."""
    if isinstance(entry, int):
        return [entry] if entry else []
    return [int(count) for count in entry]


def _at_places(question: str, *, in_sentences: bool) -> list[str]:
    """Split a question where pictures go; `in_sentences` takes every `<image>`, else only one at an edge of a line."""
    parts = question.split(IMAGE_PLACEHOLDER)
    if in_sentences:
        return parts
    joined = parts[:1]
    for part in parts[1:]:
        before = joined[-1]
        if before[-1:] in ("", "\n") or part[:1] in ("", "\n"):
            joined.append(part)
        else:
            joined[-1] = before + IMAGE_PLACEHOLDER + part
    return joined


def _check_tile_counts(pixel_values: torch.Tensor | None, num_patches_list: Sequence[int]) -> None:
    num_tiles = 0 if pixel_values is None else len(pixel_values)
    if sum(num_patches_list) != num_tiles or any(count < 1 for count in num_patches_list):
        raise ValueError(f"num_patches_list {num_patches_list} adds up to another number than the {num_tiles} tiles")
