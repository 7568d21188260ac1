"""Builds the exact folders that go to the Hub, proves them, and pushes them as the last step."""

from internvl_mpo.files import read_json
from internvl_mpo.publish.adapter import write_adapter_card, write_adapter_companions
from internvl_mpo.publish.model_folder import (
    AUTO_MAP,
    build_model_folder,
    write_companions,
    write_model_folder,
)
from internvl_mpo.publish.weights import weight_files

__all__ = [
    "AUTO_MAP",
    "build_model_folder",
    "read_json",
    "weight_files",
    "write_adapter_card",
    "write_adapter_companions",
    "write_companions",
    "write_model_folder",
]
