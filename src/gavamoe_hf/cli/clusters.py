"""`gavamoe clusters`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import CommandParser

if TYPE_CHECKING:
    from ..processing_gavamoe import GaVaMoEProcessor
    from ..vae_gmm_gavamoe import GaVaMoERatingModel


@dataclass
class ClustersArguments:
    """Options of `gavamoe clusters`."""

    model: list[str] = field(
        metadata={
            "help": "Folder or Hub id of a checkpoint, or folder of a rating model with its processor. Of several, "
            "each gets a report, and a panel in one plot.",
            # So that `--model A --model B` is the same as `--model A B`
            "action": "extend",
        }
    )
    dataset: str = field(
        metadata={"help": "The data that the models were trained on, as for `gavamoe train`."},
    )
    split: str = field(
        default="train",
        metadata={"help": "The records that are reported on.", "choices": ["train", "validation", "test"]},
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for clusters.json, clusters.md and latent_space.png; of several models, the first two go "
            "to a folder each. Not given, the report is only printed."
        },
    )
    plot: bool = field(
        default=True, metadata={"help": "Whether to draw the latent space (t-SNE), if `output_dir` is given."}
    )
    top_n: int = field(
        default=5,
        metadata={
            "help": "Most typical users, items and features of a cluster in clusters.json; the table shows three."
        },
    )
    min_count: int = field(
        default=3, metadata={"help": "Fewest records in the cluster of a typical user, item or feature."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the plot."})
    column_mapping: list[str] | None = field(
        default=None, metadata={"help": "Names of columns that differ, as for `gavamoe train`."}
    )
    split_seed: int = field(default=0, metadata={"help": "Seed of a random split, as for `gavamoe train`."})
    synthetic_groups: int = field(default=3, metadata={"help": 'Planted groups of users of "synthetic".'})


def run(argv: list[str]) -> None:
    """Prints a report of each model's clusters, and writes reports and plot."""
    (args,) = CommandParser(ClustersArguments, prog="gavamoe clusters").parse(argv)
    from ..evaluation.cluster_report import cluster_report, markdown_report, predict_pairs_of, write_cluster_report
    from ..plots import LATENT_SPACE_FILE, plot_latent_space

    loaded = {name: _load(path) for name, path in _names(args.model).items()}
    records = _read_records(args, next(iter(loaded.values()))[0].config.rating_levels)
    counts = [model.config.num_clusters for model, _ in loaded.values()]
    panels = {}
    for name, (model, processor) in loaded.items():
        outputs = predict_pairs_of(model, processor, records)
        report = cluster_report(model, processor, records, args.top_n, args.min_count, outputs)
        if len(loaded) > 1:
            print(f"## {name}\n")
        print(markdown_report(report, args.split))
        if args.output_dir is not None:
            folder = Path(args.output_dir) / name if len(loaded) > 1 else Path(args.output_dir)
            write_cluster_report(report, folder, args.split)
        title = f"K = {model.config.num_clusters}"
        if len(set(counts)) < len(counts):
            title = f"{name}, {title}"
        panels[title] = outputs.latent_mean, outputs.cluster_posterior.argmax(dim=-1)
    if args.plot and args.output_dir is not None:
        plot_latent_space(panels, Path(args.output_dir) / LATENT_SPACE_FILE, seed=args.seed)


def _names(paths: list[str]) -> dict[str, str]:
    """Each path under a name that can be a folder's: its last part where these differ, else all of it."""
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = ["_".join(Path(path).resolve().parts[1:]) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"Expected different models, but got one of {paths} twice. Name each once.")
    return dict(zip(names, paths, strict=True))


def _load(path: str) -> tuple[GaVaMoERatingModel, GaVaMoEProcessor]:
    from ..loading import check_checkpoint, load_checkpoint
    from ..processing_gavamoe import GaVaMoEProcessor
    from ..vae_gmm_gavamoe import GaVaMoERatingModel

    config = Path(path) / "config.json"
    # Among its architectures; a file that is not JSON is named by `load_checkpoint`
    if config.is_file() and '"GaVaMoERatingModel"' in config.read_text(encoding="utf-8"):
        check_checkpoint(Path(path), ("config.json", "processor_config.json", "model.safetensors"))
        no_code = {"trust_remote_code": False}
        model = GaVaMoERatingModel.from_pretrained(path, **no_code).eval()
        return model, GaVaMoEProcessor.from_pretrained(path, **no_code)
    model, processor = load_checkpoint(path)
    return model.rating_model, processor


def _read_records(args: ClustersArguments, rating_levels: list[float]):
    from ..training.pipeline import DataArguments, read_data

    records, _ = read_data(
        DataArguments(
            dataset=args.dataset,
            column_mapping=args.column_mapping,
            rating_levels=rating_levels,
            # No model knows them, and training has said so
            unknown_held_out="drop",
            split_seed=args.split_seed,
            synthetic_groups=args.synthetic_groups,
        )
    )
    return records[args.split]
