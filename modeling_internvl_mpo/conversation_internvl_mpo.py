"""The conversation templates of InternVL, as plain strings and as jinja.

`render` is what `chat` sends to the model; `chat_template` gives the jinja text that makes
`processor.apply_chat_template` produce the same bytes.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

IMAGE_PLACEHOLDER = "<image>"
IMG_START, IMG_END, IMG_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"
CLOSING = ".,;:!?)]。，、；：！？）】"  # what a line may go on with directly behind an image

_SYSTEM_V2 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_V2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)


@dataclass(frozen=True)
class Conversation:
    """How turns become one prompt: system text + sep, then role + message + sep per turn.

    `sep` also ends an answer. A turn without a message renders as its role alone, which is how a prompt asks for an
    answer (and how the original renders an empty answer in a history).
    """

    name: str
    system_prefix: str
    system_message: str
    user: str
    assistant: str
    sep: str

    def render(self, messages: Sequence[tuple[str, str | None]], system_message: str | None = None) -> str:
        """Return the prompt.

        Args:
            messages: (role, text) pairs; role is "user" or "assistant".
            system_message: replaces the template's own; None keeps it.
        """
        system = self.system_message if system_message is None else system_message
        return self.system_prefix + system + self.sep + "".join(self.render_turn(*message) for message in messages)

    def render_turn(self, role: str, text: str | None) -> str:
        """Return one turn: the role's header, and the text with its end if there is one.

        Raises:
            ValueError: the role is neither "user" nor "assistant".
        """
        headers = {"user": self.user, "assistant": self.assistant}
        if role not in headers:
            raise ValueError(f"role {role!r} is not known; give 'user' or 'assistant'")
        return headers[role] + (text + self.sep if text else "")

    def chat_template(self, system_message: str | None = None) -> str:
        """Return a jinja chat template that renders as `render` does.

        Content may be a string or a list of `{"type": "text"}` and `{"type": "image"}` items. An image becomes
        `<image>` followed by a newline, unless it is the last item, the next text begins with whitespace, or a line of
        text ends with the image and the next text closes it ("as in <image>."). A first message of role "system"
        replaces the system message.
        """
        system = self.system_message if system_message is None else system_message
        quote = json.dumps
        return _JINJA.format(
            prefix=quote(self.system_prefix, ensure_ascii=False),
            system=quote(system, ensure_ascii=False),
            sep=quote(self.sep, ensure_ascii=False),
            user=quote(self.user, ensure_ascii=False),
            assistant=quote(self.assistant, ensure_ascii=False),
            image=quote(IMAGE_PLACEHOLDER),
            closing=quote(CLOSING, ensure_ascii=False),
        )


# Serving engines look for a loop over `message.content` to learn that they may send lists; they do not find one whose
# messages were put into a namespace or whose content passes through an expression.
_JINJA = """\
{{%- set sep = {sep} -%}}
{{%- set roles = {{"user": {user}, "assistant": {assistant}}} -%}}
{{%- if not messages or messages[0].role != "system" -%}}
    {{{{- {prefix} ~ {system} ~ sep -}}}}
{{%- endif -%}}
{{%- for message in messages -%}}
    {{%- set is_system = loop.first and message.role == "system" -%}}
    {{%- if not is_system and message.role not in roles -%}}
        {{{{- raise_exception("role '" ~ message.role ~ "' is not known; give user, assistant, or a first system") -}}}}
    {{%- endif -%}}
    {{{{- {prefix} if is_system else roles[message.role] -}}}}
    {{%- set text -%}}
        {{%- if message.content is string -%}}
            {{{{- message.content -}}}}
        {{%- elif message.content -%}}
            {{%- for item in message.content -%}}
                {{%- if item.type == "image" -%}}
                    {{{{- {image} -}}}}
                    {{%- if loop.nextitem is defined -%}}
                        {{%- set before = loop.previtem.text or "\\n" if loop.previtem is defined else "\\n" -%}}
                        {{%- set after = loop.nextitem.text or "x" -%}}
                        {{%- set in_line = not before.endswith("\\n") and after[0] in {closing} -%}}
                        {{%- if not after[0].isspace() and not in_line -%}}
                            {{{{- "\\n" -}}}}
                        {{%- endif -%}}
                    {{%- endif -%}}
                {{%- elif item.type == "text" -%}}
                    {{{{- item.text -}}}}
                {{%- else -%}}
                    {{{{- raise_exception("content type '" ~ item.type ~ "' is not known; give text and images") -}}}}
                {{%- endif -%}}
            {{%- endfor -%}}
        {{%- endif -%}}
    {{%- endset -%}}
    {{%- if text or is_system -%}}
        {{{{- text ~ sep -}}}}
    {{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}
    {{{{- roles["assistant"] -}}}}
{{%- endif -%}}
"""


def _chatml(name: str, system_message: str, sep: str) -> Conversation:
    return Conversation(
        name, "<|im_start|>system\n", system_message, "<|im_start|>user\n", "<|im_start|>assistant\n", sep
    )


# The first three render as their names say, without a newline after `sep`; only internvl2_5 has one. The templates
# that the vendor's tokenizer_config.json files carry differ from what the models were trained on.
CONVERSATIONS = {
    conversation.name: conversation
    for conversation in (
        _chatml("internlm2-chat", _SYSTEM_V2, "<|im_end|>"),
        _chatml("Hermes-2", _SYSTEM_V2, "<|im_end|>"),
        Conversation("phi3-chat", "<|system|>\n", _SYSTEM_V2, "<|user|>\n", "<|assistant|>\n", "<|end|>"),
        _chatml("internvl2_5", _SYSTEM_V2_5, "<|im_end|>\n"),
    )
}


def get_conversation(name: str | None) -> Conversation:
    """Return the conversation template called `name`.

    Raises:
        ValueError: the name is not known.
    """
    if name not in CONVERSATIONS:
        raise ValueError(
            f"conversation template {name!r} is not known; config.template is one of {list(CONVERSATIONS)}"
        )
    return CONVERSATIONS[name]
