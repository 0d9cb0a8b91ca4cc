from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "ato_optim" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
BENCH = ["matplotlib", "scikit-learn", "tqdm"]

setup(
    name="ato_optim",
    version=VERSION,
    description="Auto-Train-Once: a PyTorch optimizer that prunes the network which it trains",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=find_packages(include=["ato_optim", "ato_optim.*"]),
    package_data={"ato_optim": ["py.typed"]},
    # guard.py replaces functions inside of torch-pruning for the time of a trace.
    install_requires=["torch>=2.6", "torchvision", "torch-pruning>=1.6.1,<1.7", "numpy"],
    extras_require={
        "bench": BENCH,
        "test": [*BENCH, "hypothesis", "mypy", "pytest", "ruff"],
        "integrations": ["lightning", "accelerate", "transformers"],
        "docs": ["mkdocs"],
    },
)
