"""Package of cogvideo_dist. Versions that are known to work together are pinned in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

EXTRAS = {
    "train": ["deepspeed>=0.18", "webdataset>=1.0", "tensorboard>=2.16", "transformers>=4.56", "sentencepiece>=0.2"],
    "remote": ["fsspec>=2025.5", "aiohttp>=3.11", "s3fs>=2025.5"],
    "video": ["av>=16", "pillow>=11"],
    "vae": ["lpips>=0.1.4", "torchvision"],
    "lowbit": ["torchao>=0.14"],
    "quantized": ["torchao>=0.14"],
    "export": ["diffusers>=0.34", "accelerate", "peft"],
    "demo": ["scikit-image>=0.25"],
    "dev": [
        "pytest>=8",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
        "mypy",
        "types-PyYAML",
        "matplotlib>=3.9",
        "moto[s3,server]>=5.1",
    ],
}

version = next(
    line.split('"')[1] for line in Path("cogvideo_dist/__init__.py").read_text().splitlines() if "__version__" in line
)

setup(
    name="cogvideo_dist",
    version=version,
    description="Distributed training of CogVideoX-class text-to-video diffusion models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10,<3.13",
    packages=find_packages(
        include=["cogvideo_dist", "cogvideo_dist.*", "launch", "launch.*", "data_tools", "data_tools.*"]
    ),
    install_requires=[
        "torch>=2.11",
        "numpy",
        "safetensors>=0.5",
        "pyyaml>=6",
        "pydantic>=2.9",
        "tqdm>=4.66",
        "pyarrow>=18",
        "xxhash>=3.5",
    ],
    extras_require={**EXTRAS, "all": sorted({item for items in EXTRAS.values() for item in items})},
)
