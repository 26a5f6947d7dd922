"""What a study trains: its configuration file, and the cells that follow from it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cli.arguments import CommandParser
from ..cli.train import FROM_SCRATCH
from ..configuration_gavamoe import GaVaMoEConfig
from ..training.building import ModelArguments
from ..training.lora import LoraArguments
from ..training.pipeline import DataArguments, RatingArguments
from ..training.sft_config import GaVaMoESFTConfig
from .paper_results import PAPER_RESULTS

FULL = "none"
ABLATIONS = ("no_multi_gating", "no_fine_grained_experts", "base")
PROTOCOLS = ("given", "predicted")
_ARGUMENTS = (DataArguments, ModelArguments, RatingArguments, GaVaMoESFTConfig, LoraArguments)
# What a cell says, or the study does
_SET_BY_STUDY = ("ablation", "seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "dry_run")


@dataclass(frozen=True)
class Cell:
    """
    One model of a study. The same cell may stand in several tables.

    Attributes:
        seed (`int`): Seed of both stages.
        num_clusters (`int`): Clusters, and gates, K.
        alpha (`float`): Weight of the negative ELBO (eq. 13).
        ablation (`str`): What is left out; `"none"` is the full model.
    """

    seed: int
    num_clusters: int
    alpha: float
    ablation: str = FULL

    @property
    def name(self) -> str:
        """The name of its folder, such as `full_k3_alpha0.1_seed0`."""
        variant = "full" if self.ablation == FULL else self.ablation
        return f"{variant}_k{self.num_clusters}_alpha{self.alpha:g}_seed{self.seed}"

    @property
    def rating_name(self) -> str:
        """The name of the rating model that it shares with all cells of the same seed and K."""
        return f"k{self.num_clusters}_seed{self.seed}"


@dataclass
class StudyConfig:
    """
    A study, as its YAML file holds it.

    Args:
        output_dir (`str`): The study's folder.
        train (`dict[str, Any]`): Options of `gavamoe train` that every cell shares: data, sizes, budget. `num_clusters`
            and `alpha` are those of the main table and the ablations; 3 and 0.1 where not given.
        seeds (`list[int]`, defaults to `[0, 1, 2]`): Seeds that every cell is trained with. The data stays the same.
        ablations (`list[str]`): Of figure 3; all three by default.
        num_clusters (`list[int]`, defaults to `[2, 3, 4, 5]`): Numbers of gates to compare (table 3).
        alphas (`list[float]`, defaults to `[0.0, 0.1, 0.3, 0.5]`): Weights of the negative ELBO to compare.
        protocols (`list[str]`, defaults to `["given", "predicted"]`): As in [`predict_records`].
        peers (`dict[str, dict[str, str]]`): For each peer's name `predictions`, a JSON lines file of the test records
            in order as `gavamoe train` writes it, absolute or relative to the data set's folder, and `protocol`,
            `"given"` where it was told the record's feature, else `"predicted"`.
        paper_dataset (`str`, *optional*): `"amazon"`, `"tripadvisor"` or `"yelp"` where the data is the paper's.
        keep_checkpoints (`bool`, defaults to `False`): Whether cells keep their models once they are scored.

    Raises:
        `ValueError`: for values that no study can be made of.
    """

    output_dir: str
    train: dict[str, Any]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    ablations: list[str] = field(default_factory=lambda: list(ABLATIONS))
    num_clusters: list[int] = field(default_factory=lambda: [2, 3, 4, 5])
    alphas: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3, 0.5])
    protocols: list[str] = field(default_factory=lambda: list(PROTOCOLS))
    peers: dict[str, dict[str, str]] = field(default_factory=dict)
    paper_dataset: str | None = None
    keep_checkpoints: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.train, Mapping) or "dataset" not in self.train:
            raise ValueError("Expected `train` as options of `gavamoe train` with at least `dataset`: none is there.")
        known = {option.name for group in _ARGUMENTS for option in dataclasses.fields(group)}
        _check_members("train", self.train, sorted(known - set(_SET_BY_STUDY)), "an option of `gavamoe train`")
        for name in ("seeds", "ablations", "num_clusters", "alphas", "protocols"):
            if not isinstance(getattr(self, name), list):
                raise ValueError(f"Expected `{name}` as a list, but got {getattr(self, name)!r}.")
        if not self.seeds or not self.protocols:
            raise ValueError("Expected at least one of `seeds` and of `protocols`, but got none.")
        for name, kind in (("seeds", int), ("num_clusters", int), ("alphas", int | float)):
            bad = [value for value in getattr(self, name) if isinstance(value, bool) or not isinstance(value, kind)]
            if bad:
                raise ValueError(f"Expected `{name}` as a list of numbers, but got {bad[0]!r} in it.")
        _check_members("ablations", self.ablations, ABLATIONS)
        _check_members("protocols", self.protocols, PROTOCOLS)
        for peer, entry in self.peers.items():
            if not isinstance(entry, Mapping) or set(entry) != {"predictions", "protocol"}:
                raise ValueError(f"Expected peer {peer!r} with `predictions` and `protocol` alone, but got {entry!r}.")
            _check_members(f"peers: {peer}: protocol", [entry["protocol"]], PROTOCOLS)
        if self.paper_dataset is not None:
            _check_members("paper_dataset", [self.paper_dataset], list(PAPER_RESULTS))
        if not str(self.main_num_clusters).isdecimal():
            raise ValueError(f"Expected `train: num_clusters` as a number, but got {self.main_num_clusters!r}.")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> StudyConfig:
        """
        Reads a configuration file.

        Raises:
            `ValueError`: for keys or values that are not as above.
            `OSError`: for a file that cannot be read.
        """
        import yaml

        with open(path, encoding="utf-8") as file:
            try:
                values = yaml.safe_load(file)
            except yaml.YAMLError as error:
                raise ValueError(f"{path}: expected YAML, but reading it failed: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a mapping of keys to values, but got {type(values).__name__}.")
        names = [option.name for option in dataclasses.fields(cls)]
        _check_members(str(path), values, names, "a key")
        missing = [name for name in ("output_dir", "train") if name not in values]
        if missing:
            raise ValueError(f"{path}: expected the keys output_dir and train, but {', '.join(missing)} is missing.")
        return cls(**values)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    @property
    def main_num_clusters(self) -> int:
        """K of the main table."""
        value = self.train.get("num_clusters", ModelArguments.num_clusters)
        return int(value) if str(value).isdecimal() else value

    @property
    def main_alpha(self) -> float:
        """Alpha of the main table."""
        alpha = self.train.get("alpha")
        return float(GaVaMoEConfig().alpha if alpha is None else alpha)

    def main_cell(self, seed: int) -> Cell:
        """The full model, as in the main table."""
        return Cell(seed, self.main_num_clusters, self.main_alpha)

    def ablation_cell(self, seed: int, ablation: str) -> Cell:
        """The full model without a part; without multi-gating K is 1."""
        num_clusters = 1 if ablation == "no_multi_gating" else self.main_num_clusters
        return Cell(seed, num_clusters, self.main_alpha, ablation)

    def cells(self) -> list[Cell]:
        """Every cell once, a seed after the other, so that the first seed's tables are there early."""
        cells: list[Cell] = []
        for seed in self.seeds:
            cells.append(self.main_cell(seed))
            cells += [self.ablation_cell(seed, ablation) for ablation in self.ablations]
            cells += [Cell(seed, num_clusters, self.main_alpha) for num_clusters in self.num_clusters]
            cells += [Cell(seed, self.main_num_clusters, float(alpha)) for alpha in self.alphas]
        return list(dict.fromkeys(cells))

    def arguments(
        self, cell: Cell, output_dir: Path
    ) -> tuple[DataArguments, ModelArguments, Any, GaVaMoESFTConfig, LoraArguments]:
        """The arguments of `gavamoe train` for a cell, by its command line's own defaults and types."""
        options = {
            **({} if self.train.get("base_model") else FROM_SCRATCH),
            **self.train,
            "output_dir": str(output_dir),
            "seed": cell.seed,
            "num_clusters": str(cell.num_clusters),
            "alpha": cell.alpha,
            "ablation": cell.ablation,
        }
        return CommandParser(_ARGUMENTS).parse([], options)


def _check_members(where: str, values: Any, allowed: Any, what: str = "one") -> None:
    unknown = [value for value in values if value not in allowed]
    if unknown:
        shown = f" of {', '.join(allowed)}" if len(allowed) < 20 else " that cells may share"
        raise ValueError(f"{where}: expected {what}{shown}, but got {unknown[0]!r}.")
