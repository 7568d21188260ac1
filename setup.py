"""Package metadata. Programs (train_mpo.py, evaluate_mpo.py, app.py, dataset_scripts/) run from the checkout."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "internvl_mpo/__init__.py").read_text(encoding="utf-8"))[1]

EXTRAS = {
    "train": ["peft>=0.17", "deepspeed>=0.17", "tensorboard", "trackio"],
    "qlora": ["peft>=0.17", "bitsandbytes>=0.46"],
    "data": ["ray[data]>=2.40"],
    "eval": ["evaluate>=0.4.5"],
    "serve": ["uvicorn>=0.34"],
    "demo": ["gradio>=6", "httpx", "peft>=0.17"],
    "kernels": ["liger-kernel>=0.5"],  # for CUDA; flash-attn, if wanted, is installed by its own instructions
    "dev": [
        "hypothesis",
        "ipykernel",
        "nbclient",
        "ninja",  # DeepSpeed compiles its CPU kernels with it
        "playwright",  # drives the system's Chromium; downloads no browser
        "pytest",
        "pytest-xdist",
        "ruff",
        "trl>=1.16",
    ],
}
EXTRAS["all"] = sorted({requirement for name in EXTRAS if name != "kernels" for requirement in EXTRAS[name]})

setup(
    name="internvl-mpo",
    version=VERSION,
    description="Mixed Preference Optimization for InternVL: model files, MMPR, training, evaluation, demo",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["internvl_mpo", "internvl_mpo.*", "modeling_internvl_mpo"]),
    package_data={"": ["*.css", "*.html"]},
    install_requires=[
        "torch>=2.6",
        "transformers>=5.17",
        "datasets>=4",
        "huggingface_hub>=1",
        "accelerate>=1.10",
        "safetensors",
        "sentencepiece",
        "pillow",
        "numpy",
        "pyarrow",
        "pyyaml",
        "tqdm",
        "jinja2",
        "scikit-learn",  # the handwritten digits of the embedded default
        "matplotlib",  # curves of its report
    ],
    extras_require=EXTRAS,
)
