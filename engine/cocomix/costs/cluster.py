"""Clusters that `cocomix plan` knows or is told of: how fast their GPUs and links are."""

import dataclasses
import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cocomix.core.errors import CocomixError
from cocomix.core.yaml_files import load_yaml

_FOLDERS = (Path("configs/clusters"), Path(__file__).resolve().with_name("cluster_files"))  # the user's own; ours


@dataclass
class Cluster:
    """One GPU, its node and its links. Rates are those that programs reach, not those of data sheets."""

    name: str = "cluster"
    gpus_per_node: int = 8
    memory_gb: float = 80.0  # of one GPU, 10^9 bytes
    reserved_gb: float = 3.0  # of it, for the driver's context, NCCL, the libraries' workspaces and what lies idle
    product_tflops: float = 700.0  # bfloat16, large products
    fp32_tflops: float = 50.0  # float32 products, as PyTorch computes them by default
    attention_tflops: float = 300.0  # causal attention, half the square counted
    memory_tb_s: float = 3.0
    within_gb_s: float = 450.0  # links of one GPU within a node, one direction
    between_gb_s: float = 50.0  # network of one GPU, one direction
    within_latency_us: float = 3.0  # a step of a collective within a node
    between_latency_us: float = 8.0  # and between nodes
    link_share: float = 0.8  # of a link's rate that large collectives reach
    overlap: float = 0.7  # share of communication that hides behind a backward pass, where DeepSpeed overlaps them
    launch_us: float = 5.0  # from one kernel's start to the next where the host is the bottleneck
    hook_us: float = 300.0  # DeepSpeed's Python around one module at stage 3, both passes (measured, one CPU core)


def known_clusters() -> list[str]:
    """Names of the clusters that come with the program."""
    return sorted({file.stem for folder in _FOLDERS for file in folder.glob("*.yaml")})


def load_cluster(name: str) -> Cluster:
    """A cluster by name, or from a YAML file.

    Raises `CocomixError` for an unknown name (with the known ones), an unknown key and a value that cannot be.
    """
    path = Path(name)
    if not path.is_file():
        found = [folder / f"{name}.yaml" for folder in _FOLDERS if (folder / f"{name}.yaml").is_file()]
        if not found:
            known = ", ".join(known_clusters()) or "none"
            raise CocomixError(f"--cluster {name}: there is no such file; known names: {known}")
        path = found[0]
    content = load_yaml(path, "cluster file")
    if not OmegaConf.is_dict(content):
        raise CocomixError(f"{path} holds no settings: expected keys such as gpus_per_node")
    known = [field.name for field in dataclasses.fields(Cluster)]
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise CocomixError(f"{path}: unknown key {key}; {hint}")
    try:
        cluster = cast(Cluster, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Cluster), content)))
    except OmegaConfBaseException as error:
        raise CocomixError(f"{path}: {getattr(error, 'full_key', '')}: {str(error).splitlines()[0]}") from None
    _validate(cluster, path)
    return cluster


def _validate(cluster: Cluster, path) -> None:
    for name, value in dataclasses.asdict(cluster).items():
        if name == "name":
            continue
        may_be_zero = name in ("reserved_gb", "overlap") or name.endswith("_us")
        if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
            raise CocomixError(f"{path}: {name} must be {'at least 0' if may_be_zero else 'positive'}, not {value}")
    for name in ("link_share", "overlap"):
        if getattr(cluster, name) > 1:
            raise CocomixError(f"{path}: {name} is a share and must be at most 1")
    if cluster.reserved_gb >= cluster.memory_gb:
        raise CocomixError(f"{path}: reserved_gb leaves nothing of memory_gb")
