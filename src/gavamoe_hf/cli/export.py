"""`gavamoe export`."""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import CommandParser


@dataclass
class ExportArguments:
    """Options of `gavamoe export`."""

    model: str = field(metadata={"help": "Folder or Hub id of a checkpoint, or folder of a LoRA adapter."})
    output_dir: str = field(metadata={"help": "Folder for the checkpoints; new or empty."})
    format: str = field(
        default="auto",
        metadata={
            "help": "Architecture of the checkpoints. auto: mixtral, or qwen2_moe for a model with a shared expert or "
            "with expert weights that are not rescaled, or Llama for one with dense layers.",
            "choices": ["auto", "mixtral", "qwen2_moe"],
        },
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Precision of the checkpoints; the model's by default.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )
    extra_kv_heads: int = field(
        default=0,
        metadata={
            "help": "Key-value heads to add beyond the one that is added anyway: with several GPUs, tensor parallelism "
            "has to divide their number."
        },
    )
    max_table_pairs: int = field(
        default=200_000, metadata={"help": "Most pairs whose clusters are written to router.safetensors."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Base of an adapter; where the adapter says if not given."}
    )


def run(argv: list[str]) -> None:
    """Writes a checkpoint of a standard architecture for each cluster, and prints their folders."""
    (args,) = CommandParser(ExportArguments, prog="gavamoe export").parse(argv)
    from ..export import export_standard
    from ..loading import load_checkpoint

    model, processor = load_checkpoint(args.model, args.base_model, dtype=args.dtype)
    folders = export_standard(
        model,
        processor,
        args.output_dir,
        format=args.format,
        extra_kv_heads=args.extra_kv_heads,
        max_table_pairs=args.max_table_pairs,
    )
    for folder in folders:
        print(folder)
    print(f"How to serve them: {folders[0].parent / 'README.md'}")
