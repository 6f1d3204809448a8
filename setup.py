"""Packaging: two source roots, engine/cocomix and kernels/cocomix_kernels. One place for names, versions, extras."""

from setuptools import find_packages, setup

ROOTS = {"cocomix": "engine", "cocomix_kernels": "kernels"}

CORE = [
    "torch>=2.11,<2.14",
    "triton>=3.6; platform_system == 'Linux'",  # comes with PyTorch's CUDA builds, not with its CPU build
    "transformers>=5.17,<6",  # the model is a transformers model; teachers and tokenizers are loaded with it
    "tokenizers>=0.23.1",  # trains and runs byte-level BPE on all cores
    "safetensors>=0.8",  # SAE files that cannot execute code
    "numpy>=1.26",
    "psutil>=5.9",  # which cores are busy; between machines, which network interface leads where
    "fsspec>=2024.2",  # opens compressed text; torch brings it along anyway
    "msgspec>=0.19",  # checks what JSON files hold against dataclasses; small, and imported in 20 ms
    "omegaconf>=2.3",  # YAML over dataclasses, overrides, interpolation
    "tqdm>=4.66",
    "wrapt>=1.16",  # registers the model when transformers is imported, so that importing cocomix stays fast
]

EXTRAS = {
    # `cocomix train`: DeepSpeed compiles its CPU optimizer with ninja; runs write TensorBoard files
    "train": [
        "deepspeed>=0.19.8,<0.20",
        "tensorboard>=2.17",
        "ninja>=1.11",
        "setuptools",
    ],
    "report": ["matplotlib>=3.9", "jinja2>=3.1"],  # `cocomix report`; torch brings jinja2 along anyway
    "concepts": ["jinja2>=3.1"],  # the page of `cocomix concepts`
    # of `cocomix data`: `hf:NAME` sources; Parquet, Arrow and whatever zstandard packed
    "data": ["datasets>=4.0", "pyarrow>=15"],
    # `cocomix eval --tasks`; the harness's adapter for transformers models imports accelerate
    "eval": ["lm-eval>=0.4.13,<0.5", "accelerate>=1.1"],
    "wandb": ["wandb>=0.19"],  # train.wandb_project
    # on a GPU with PyTorch 2.11 or 2.12, which lack torch.nn.functional.linear_cross_entropy
    "liger": ["liger-kernel>=0.6"],
    "flash": ["flash-attn>=2.7"],
}
EXTRAS["all"] = EXTRAS["train"] + EXTRAS["report"] + EXTRAS["concepts"] + EXTRAS["data"] + EXTRAS["eval"]
EXTRAS["test"] = [
    "pytest>=8",
    "hypothesis>=6.100",
    "pytest-xdist>=3.6",  # interpreted kernels are slow and take one core a process
]
EXTRAS["dev"] = [
    *EXTRAS["all"],
    *EXTRAS["test"],
    "pytest-benchmark>=5",
    "tiktoken>=0.7",  # token files are compared with what it makes of the same merges
    "ruff>=0.9",
    "pyright[nodejs]>=1.1.400",  # it is a Node.js program, which this brings along
]

setup(
    name="cocomix",
    version="0.2.0",
    description="A training engine for language models with continuous concepts (CoCoMix)",
    license_expression="MIT",
    license_files=["LICENSE", "NOTICE"],
    project_urls={
        "Paper": "https://arxiv.org/abs/2502.08524",
        "The paper's own code": "https://github.com/facebookresearch/RAM/tree/main/projects/cocomix",
    },
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11,<3.13",
    packages=[package for root in ROOTS.values() for package in find_packages(root)],
    package_dir={package: f"{root}/{package}" for package, root in ROOTS.items()},
    # so that `cocomix plan --cluster h100` works anywhere, and type checkers read the annotations
    package_data={
        "cocomix.costs": ["cluster_files/*.yaml"],
        "cocomix.inference": ["templates/*.j2"],
        "cocomix.report": ["templates/*.j2"],
        "cocomix": ["py.typed"],
        "cocomix_kernels": ["py.typed"],
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["cocomix=cocomix.cli:main"]},
)
