"""
Runs the paper's study: main table, ablations, numbers of gates, alpha, sparsity, figures. It may be interrupted, and
started several times side by side on one folder.

    python examples/reproduce_paper.py --config examples/study/synthetic.yaml
    python examples/reproduce_paper.py --config examples/study/musical_instruments.yaml --dataset musical_instruments
    python examples/reproduce_paper.py --config examples/study/musical_instruments.yaml --only seed0 --dry_run
"""

import logging
import sys
from dataclasses import dataclass, field

import torch
from transformers import HfArgumentParser
from transformers import logging as transformers_logging

from gavamoe_hf.study import StudyConfig, cell_states, read_study_data, run_study, write_report


@dataclass
class ScriptArguments:
    config: str = field(metadata={"help": "YAML file of the study, such as those in examples/study."})
    dataset: str | None = field(default=None, metadata={"help": "Where the data is, in place of the file's `dataset`."})
    output_dir: str | None = field(default=None, metadata={"help": "The study's folder, in place of the file's."})
    only: str | None = field(default=None, metadata={"help": "Regular expression of the names of cells to run."})
    max_cells: int | None = field(default=None, metadata={"help": "Stop after so many cells."})
    num_threads: int | None = field(default=None, metadata={"help": "Threads of this process, all if not given."})
    dry_run: bool = field(default=False, metadata={"help": "List the cells and how far they are, and stop."})


def main(args: ScriptArguments) -> int:
    config = StudyConfig.from_yaml(args.config)
    config.output_dir = args.output_dir or config.output_dir
    config.train["dataset"] = args.dataset or config.train["dataset"]
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    if args.dry_run:
        states = cell_states(config, args.only)
        for name, state in states.items():
            print(f"{state:8} {name}")
        print(f"{sum(state == 'done' for state in states.values())} of {len(states)} done")
        return 0

    data = read_study_data(config)
    failures = run_study(config, data, args.only, args.max_cells)
    write_report(config, data)
    print((config.folder / "study.md").read_text(encoding="utf-8"))
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    transformers_logging.set_verbosity_warning()
    for noisy in ("httpx", "absl", "rouge_score", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    (script_args,) = HfArgumentParser(ScriptArguments).parse_args_into_dataclasses()
    sys.exit(main(script_args))
