"""InternVL chat models on current transformers: configuration, model, image processor, processor.

Importing this package registers the classes with transformers' Auto classes, so that official InternVL folders load
without remote code. The same files travel beside the weights of a published model (`trust_remote_code=True`).
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # hidden on top without torchvision

from .configuration_internvl_mpo import InternLM2Config, InternVisionConfig, InternVLChatConfig
from .conversation_internvl_mpo import CONVERSATIONS, Conversation, get_conversation
from .image_processing_internvl_mpo import InternVLImageProcessor, dynamic_preprocess, load_image, video_frame_indices
from .modeling_intern_vit import InternVisionModel
from .modeling_internlm2 import InternLM2ForCausalLM, InternLM2Model
from .modeling_internvl_mpo import InternVLChatModel
from .processing_internvl_mpo import InternVLChatProcessor
from .tokenization_internvl_mpo import InternLM2Tokenizer

__all__ = [
    "CONVERSATIONS",
    "Conversation",
    "InternLM2Config",
    "InternLM2ForCausalLM",
    "InternLM2Model",
    "InternLM2Tokenizer",
    "InternVLChatConfig",
    "InternVLChatModel",
    "InternVLChatProcessor",
    "InternVLImageProcessor",
    "InternVisionConfig",
    "InternVisionModel",
    "dynamic_preprocess",
    "get_conversation",
    "load_image",
    "video_frame_indices",
]

AutoConfig.register("internvl_chat", InternVLChatConfig)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
    _auto_class.register(InternVLChatConfig, InternVLChatModel)
AutoImageProcessor.register(InternVLChatConfig, slow_image_processor_class=InternVLImageProcessor)
AutoProcessor.register(InternVLChatConfig, InternVLChatProcessor)
AutoTokenizer.register(InternLM2Config, fast_tokenizer_class=InternLM2Tokenizer)

# What is saved brings its code along, so that the folder loads with trust_remote_code wherever it goes.
InternVLChatConfig.register_for_auto_class()
InternVLChatModel.register_for_auto_class("AutoModel")
InternVLChatProcessor.register_for_auto_class("AutoProcessor")
InternVLImageProcessor.register_for_auto_class("AutoImageProcessor")
