"""Package metadata, and the programs of a checkout that a wheel brings along (see internvl_mpo/programs.py)."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

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

BESIDE_THE_PACKAGE = ("*.py", "LICENSE", "dataset_scripts/*.py", "runs/*.py", "configs/**/*")


class BuildWithPrograms(build_py):
    """Puts programs and run files into `internvl_mpo/checkout` of a wheel; an editable install has the checkout."""

    def run(self) -> None:
        """Build the package, then copy."""
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "internvl_mpo" / "checkout"
        shutil.rmtree(target, ignore_errors=True)
        files = [path for pattern in BESIDE_THE_PACKAGE for path in HERE.glob(pattern) if path.is_file()]
        for path in files:
            if path.name != "setup.py":
                copy = target / path.relative_to(HERE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)


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
    cmdclass={"build_py": BuildWithPrograms},
    entry_points={"console_scripts": ["internvl-mpo = internvl_mpo.__main__:run"]},
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
