"""
Stage 1 at the size of the paper's data sets, on generated ratings: pairs per second, peak memory, and how near the
trainer comes to a bare loop of the same matrix products.

    OMP_NUM_THREADS=1 python benchmarks/rating_scale.py --size tripadvisor --output_dir outputs/scale_tripadvisor
    OMP_NUM_THREADS=1 python benchmarks/rating_scale.py --size yelp --output_dir outputs/scale_yelp

`RatingTrainer`, with its data loader, optimiser, evaluation and checkpoint, and the bare loop take turns of a few steps
in one process, on batches of the same sizes, so that whatever else the machine does slows both. Rates are by wall clock
and, for a machine with other work, by processor time. The first turn is not counted. A few steps stand for an epoch
unless `--full` is given; ids, ratings and tables are those of the whole data set all the same. CPU, one thread.

What the bare loop computes, and what it leaves out, stands in `bare_loop.py`.

Leaves `rating_scale.json` and `rating_scale.md` in `output_dir`.
"""

import argparse
import logging
import math
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bare_loop import LEARNING_RATE, BareLoop, bare_batches, weight
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed
from transformers.utils.logging import disable_progress_bar

from gavamoe_hf import GaVaMoEConfig
from gavamoe_hf.evaluation.predict import write_json, write_text
from gavamoe_hf.training.initialization import initialize_mixture, leave_one_out_offsets
from gavamoe_hf.training.rating_trainer import (
    AUTOENCODER,
    ELBO,
    RatingDataset,
    RatingTrainer,
    RatingTrainingArguments,
)
from gavamoe_hf.vae_gmm_gavamoe import GaVaMoERatingModel

logger = logging.getLogger("rating_scale")

SIZES = {"tripadvisor": (9_765, 6_280, 320_023), "yelp": (27_147, 20_266, 1_293_247)}  # users, items, pairs
_EVAL_PAIRS = 16_384


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=4096, help="Pairs per step. Paper: 4096.")
    parser.add_argument("--max_steps", type=int, default=14, help="Steps of each phase, the first turn included.")
    parser.add_argument("--turn_steps", type=int, default=2, help="Steps after which the loops take turns.")
    parser.add_argument("--full", action="store_true", help="A whole epoch, and the mixture fit on all pairs.")
    parser.add_argument("--phases", nargs="+", choices=[AUTOENCODER, ELBO], default=[AUTOENCODER, ELBO])
    parser.add_argument("--mixture_share", type=float, default=0.05, help="Share of the users in the mixture fit.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.max_steps < 2 * args.turn_steps:
        parser.error("`--max_steps` must be at least twice `--turn_steps`, since the first turn is not counted.")
    steps_of_epoch = -(-SIZES[args.size][2] // args.batch_size)
    args.max_steps = steps_of_epoch if args.full else min(args.max_steps, steps_of_epoch)
    args.mixture_share = 1.0 if args.full else args.mixture_share
    return args


def generate_ratings(num_users: int, num_items: int, num_pairs: int, seed: int) -> RatingDataset:
    """Pairs whose users and items follow power laws, every one of them at least once, with random ratings."""
    draw = np.random.default_rng(seed)

    def ids(count: int) -> np.ndarray:
        weights = (np.arange(count) + 10.0) ** -0.8
        drawn = draw.choice(count, num_pairs - count, p=weights / weights.sum())
        return draw.permutation(np.concatenate([np.arange(count), drawn]))

    ratings = draw.choice(5, num_pairs, p=[0.04, 0.06, 0.15, 0.30, 0.45]) + 1
    return RatingDataset(*map(torch.from_numpy, (ids(num_users), ids(num_items), ratings)))


class TakeTurns(TrainerCallback):
    """Stops the trainer's clock every `turn_steps` steps while the bare loop runs as many, and keeps both times."""

    def __init__(self, bare: BareLoop | None, batches: list[tuple[torch.Tensor, ...]], turn_steps: int):
        self.bare, self.batches, self.turn_steps = bare, batches, turn_steps
        self.turns: list[dict[str, float]] = []
        self.evaluation_seconds = self.checkpoint_seconds = math.nan
        self._parts: dict[str, float] = defaultdict(float)
        self._step = self._turn_start = 0
        self._start_clocks()

    def _start_clocks(self) -> None:
        self._last, self._last_processor = time.perf_counter(), time.process_time()

    def _lap(self, part: str) -> None:
        now = time.perf_counter()
        self._parts[part] += now - self._last
        self._last = now

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start_clocks()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._lap("loader")

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._lap("forward, backward, clipping")

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._lap("optimiser")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._lap("rest")
        self._step += 1
        if self._step - self._turn_start == self.turn_steps:
            self._end_turn()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        if self._step > self._turn_start:
            self._end_turn()
        self._start_clocks()

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.evaluation_seconds = time.process_time() - self._last_processor
        self._start_clocks()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.checkpoint_seconds = time.perf_counter() - self._last

    def _end_turn(self) -> None:
        turn = {"trainer": sum(self._parts.values()), "trainer_processor": time.process_time() - self._last_processor}
        batches = self.batches[self._turn_start : self._step]
        self._start_clocks()
        for batch in batches if self.bare is not None else []:
            self.bare.step(*batch)
        turn["bare"] = time.perf_counter() - self._last
        turn["bare_processor"] = time.process_time() - self._last_processor
        turn["pairs"] = sum(len(batch[0]) for batch in batches)
        self.turns.append({**turn, "parts": dict(self._parts)})
        logger.info("step %d: %s", self._step, {name: round(value, 2) for name, value in turn.items()})
        self._parts.clear()
        self._turn_start = self._step
        self._start_clocks()


class OnePhaseTrainer(RatingTrainer):
    """[`RatingTrainer`] that runs one phase by itself, with nothing before or after."""

    def train_phase(self, phase: str, cluster_target: torch.Tensor) -> None:
        offset = leave_one_out_offsets(self.model, *self._ratings)
        self.train_dataset = self.train_dataset.with_column("offset", offset)
        self._cluster_target = cluster_target
        self._start(phase, LEARNING_RATE)
        Trainer.train(self)


def run_phase(
    model: GaVaMoERatingModel,
    ratings: RatingDataset,
    phase: str,
    args: argparse.Namespace,
    cluster_target: torch.Tensor,
    turns: TakeTurns,
) -> OnePhaseTrainer:
    """`max_steps` steps of a phase, then evaluation and a checkpoint, as at the end of an epoch."""
    evaluated = RatingDataset(**{name: column[:_EVAL_PAIRS] for name, column in ratings.columns.items()})
    with tempfile.TemporaryDirectory() as folder:
        training_args = RatingTrainingArguments(
            output_dir=folder,
            seed=args.seed,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            max_steps=args.max_steps,
            per_device_train_batch_size=args.batch_size,
        )
        trainer = OnePhaseTrainer(model, training_args, ratings, evaluated, callbacks=[turns])
        trainer.remove_callback(PrinterCallback)
        trainer.train_phase(phase, cluster_target)
    return trainer


def time_phase(
    model: GaVaMoERatingModel,
    ratings: RatingDataset,
    phase: str,
    args: argparse.Namespace,
    cluster_target: torch.Tensor,
) -> dict[str, Any]:
    """A phase of the trainer and the bare loop by turns, in seconds and pairs."""
    bare = BareLoop(model.config, trains_tables=phase != ELBO)
    turns = TakeTurns(bare, bare_batches(ratings, args.batch_size), args.turn_steps)
    trainer = run_phase(model, ratings, phase, args, cluster_target, turns)
    start = time.process_time()
    num_loaded = sum(len(batch["rating"]) for batch in trainer.get_train_dataloader())
    loader_seconds = time.process_time() - start
    few = trainer.train_dataset.__getitems__(list(range(64)))
    return {
        **summarise(turns.turns[1:], len(ratings)),
        "matrix_product_flops_per_pair": {
            "trainer": count_flops(lambda: trainer.training_step(model, few)) / 64,
            "bare": count_flops(lambda: bare.step(*bare_batches(ratings, 64)[0])) / 64,
        },
        "loader_alone_pairs_per_second": num_loaded / loader_seconds,
        "evaluation_pairs_per_second": _EVAL_PAIRS / turns.evaluation_seconds,
        "checkpoint_seconds": turns.checkpoint_seconds,
    }


def count_flops(step: Callable[[], Any]) -> int:
    """Operations of the matrix products in a training step, without the two-token attention, which is not counted."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def summarise(turns: list[dict[str, Any]], num_pairs: int) -> dict[str, Any]:
    """Rates and ratio of all turns together, by wall clock and by processor time, and where the trainer's time goes."""
    summary: dict[str, Any] = {"pairs_measured": sum(turn["pairs"] for turn in turns)}
    for clock, suffix in (("wall", ""), ("processor", "_processor")):
        trainer, bare = (sum(turn[name + suffix] for turn in turns) for name in ("trainer", "bare"))
        ratios = [turn["bare" + suffix] / turn["trainer" + suffix] for turn in turns]
        summary[clock] = {
            "pairs_per_second": summary["pairs_measured"] / trainer,
            "bare_pairs_per_second": summary["pairs_measured"] / bare,
            "ratio": bare / trainer,
            "ratio_lowest_turn": min(ratios),
            "ratio_highest_turn": max(ratios),
            "epoch_seconds": trainer * num_pairs / summary["pairs_measured"],
        }
    parts = {part: sum(turn["parts"][part] for turn in turns) for part in turns[0]["parts"]}
    return {**summary, "shares_of_step": {part: seconds / sum(parts.values()) for part, seconds in parts.items()}}


def time_mixture(
    model: GaVaMoERatingModel, ratings: RatingDataset, args: argparse.Namespace
) -> tuple[dict[str, float], torch.Tensor]:
    """The mixture fit on a share of the users and all of their pairs, and the clusters of users that it finds."""
    num_users = model.config.num_users
    draw = torch.Generator().manual_seed(args.seed)
    chosen = torch.zeros(num_users, dtype=torch.bool)
    chosen[torch.randperm(num_users, generator=draw)[: round(args.mixture_share * num_users)]] = True
    user_id, item_id = ratings.columns["user_id"], ratings.columns["item_id"]
    rows = chosen[user_id]
    start = time.perf_counter(), time.process_time()
    target = initialize_mixture(model, user_id[rows], item_id[rows], seed=args.seed)
    timed = {
        "users": int(chosen.sum()),
        "pairs": int(rows.sum()),
        "wall_seconds": time.perf_counter() - start[0],
        "processor_seconds": time.process_time() - start[1],
    }
    # Users dominate, each with the pairs of its profile
    return timed | {"all_users_seconds": timed["processor_seconds"] * num_users / timed["users"]}, target


def time_table_update(config: GaVaMoEConfig, ratings: RatingDataset, batch_size: int, is_sparse: bool) -> float:
    """Processor seconds that gradient and update of the two tables take in a step, the median of five."""
    ids = [ratings.columns[name][:batch_size] for name in ("user_id", "item_id")]
    tables = [weight(count, config.vae_embedding_size) for count in (config.num_users, config.num_items)]
    optimizer = torch.optim.SparseAdam(tables) if is_sparse else torch.optim.AdamW(tables, fused=True)
    seconds = []
    for _ in range(6):
        start = time.process_time()
        rows = [F.embedding(of_kind, table, sparse=is_sparse) for of_kind, table in zip(ids, tables, strict=True)]
        sum(row.sum() for row in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[1:])


def prepare(args: argparse.Namespace, **sizes: int) -> tuple[GaVaMoERatingModel, RatingDataset]:
    torch.set_num_threads(1)
    disable_progress_bar()
    set_seed(args.seed)
    num_users, num_items, num_pairs = SIZES[args.size]
    model = GaVaMoERatingModel(GaVaMoEConfig(num_users=num_users, num_items=num_items, **sizes))
    return model, generate_ratings(num_users, num_items, num_pairs, args.seed)


# What peak memory is taken of, each in a process of its own, since a process only knows its highest peak


def _run_nothing(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)


def _run_trainer(args: argparse.Namespace) -> None:
    model, ratings = prepare(args)
    short = argparse.Namespace(**{**vars(args), "max_steps": 2})
    turns = TakeTurns(None, bare_batches(ratings, args.batch_size), args.turn_steps)
    run_phase(model, ratings, AUTOENCODER, short, torch.empty(0), turns)


def _run_bare(args: argparse.Namespace) -> None:
    model, ratings = prepare(args)
    bare = BareLoop(model.config)
    del model
    for batch in bare_batches(ratings, args.batch_size)[:2]:
        bare.step(*batch)


def _run_narrow_mixture(args: argparse.Namespace) -> None:
    # All users and pairs in a minute: what the fit keeps of each does not depend on the encoder's width
    model, ratings = prepare(args, vae_embedding_size=8, vae_intermediate_size=8)
    initialize_mixture(model, ratings.columns["user_id"], ratings.columns["item_id"], seed=args.seed)


_MEMORY_OF: dict[str, Callable[[argparse.Namespace], None]] = {
    "imports alone": _run_nothing,
    "trainer, two steps, evaluation and checkpoint": _run_trainer,
    "bare loop, two steps": _run_bare,
    "mixture fit on all pairs, encoder of width 8": _run_narrow_mixture,
}


def _peak_memory(name: str, args: argparse.Namespace) -> float:
    _MEMORY_OF[name](args)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kibibytes on Linux


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """Peak resident memory in MiB of each part, imports included."""
    peaks = {}
    for name in _MEMORY_OF:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            peaks[name] = pool.submit(_peak_memory, name, args).result()
        logger.info("memory of %s: %.0f MiB", name, peaks[name])
    return peaks


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model, ratings = prepare(args)
    config = model.config
    tables = (config.num_users + config.num_items) * config.vae_embedding_size
    load_average = os.getloadavg()[2]
    memory = measure_memory(args)
    mixture, target = time_mixture(model, ratings, args)
    logger.info("mixture fit: %s", mixture)
    return {
        **{name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "torch": torch.__version__,
        "num_threads": torch.get_num_threads(),
        "load_average": load_average,
        "num_cpus": os.cpu_count(),
        "num_users": config.num_users,
        "num_items": config.num_items,
        "num_pairs": len(ratings),
        "parameters": {"tables": tables, "others": model.num_parameters() - tables},
        "phases": {phase: time_phase(model, ratings, phase, args, target) for phase in args.phases},
        "mixture": mixture,
        "table_update_seconds": {
            "dense gradients, AdamW (as trained)": time_table_update(config, ratings, args.batch_size, False),
            "sparse gradients, SparseAdam": time_table_update(config, ratings, args.batch_size, True),
        },
        "peak_memory_mib": memory,
    }


def phase_rows(phases: dict[str, dict[str, Any]], epoch: str) -> dict[str, list[str]]:
    """Rows of the table with a column for each phase."""
    rows: dict[str, list[str]] = {}
    for clock, name in (("wall", "wall clock"), ("processor", "processor time")):
        of_clock = [phase[clock] for phase in phases.values()]
        rows[f"{name}: trainer, pairs/s"] = [f"{of['pairs_per_second']:.0f}" for of in of_clock]
        rows[f"{name}: bare loop, pairs/s"] = [f"{of['bare_pairs_per_second']:.0f}" for of in of_clock]
        rows[f"{name}: trainer / bare loop"] = [
            "{ratio:.3f} (turns {ratio_lowest_turn:.3f} to {ratio_highest_turn:.3f})".format(**of) for of in of_clock
        ]
        rows[f"{name}: {epoch}"] = [f"{of['epoch_seconds'] / 60:.1f} min" for of in of_clock]
    for part in next(iter(phases.values()))["shares_of_step"]:
        shares = [phase["shares_of_step"][part] for phase in phases.values()]
        rows[f"share of the trainer's step: {part}"] = [f"{100 * share:.2f} %" for share in shares]
    flops = [phase["matrix_product_flops_per_pair"] for phase in phases.values()]
    rows["MFLOP of matrix products a pair: trainer, bare loop"] = [
        f"{of['trainer'] / 1e6:.1f}, {of['bare'] / 1e6:.1f}" for of in flops
    ]
    for name, label in (("loader_alone", "data loader alone"), ("evaluation", "evaluation")):
        rows[f"{label}, pairs/s of processor time"] = [
            f"{phase[name + '_pairs_per_second']:,.0f}" for phase in phases.values()
        ]
    rows["checkpoint"] = [f"{phase['checkpoint_seconds']:.2f} s" for phase in phases.values()]
    return rows


def as_markdown(report: dict[str, Any]) -> str:
    phases, mixture, parameters = report["phases"], report["mixture"], report["parameters"]
    rows = phase_rows(phases, "epoch" if report["full"] else "epoch, extrapolated")
    counts = [f"{report[name]:,} {name.split('_')[1]}" for name in ("num_users", "num_items", "num_pairs")]
    scope = "" if report["full"] else f", so {mixture['all_users_seconds'] / 60:.1f} min on all (extrapolated)"
    lines = [
        f"Stage 1 at the size of {report['size']}, generated: {', '.join(counts)}; batches of {report['batch_size']}; "
        f"{parameters['tables']:,} parameters in tables, {parameters['others']:,} in others; {report['max_steps']} "
        f"steps a phase, the first {report['turn_steps']} not counted; {report['num_threads']} CPU thread, torch "
        f"{report['torch']}; load average at the start {report['load_average']:.1f} on {report['num_cpus']} CPUs.",
        "",
        "| | " + " | ".join(phases) + " |",
        "|---|" + "---|" * len(phases),
        *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()),
        "",
        f"Mixture fit: {mixture['processor_seconds']:.1f} s of processor time on {mixture['users']:,} users with "
        f"{mixture['pairs']:,} pairs{scope}.",
        "",
        "| tables in a step: gradient and update | ms of processor time |",
        "|---|---|",
        *(f"| {name} | {1000 * seconds:.1f} |" for name, seconds in report["table_update_seconds"].items()),
        "",
        "| peak memory, imports included | MiB |",
        "|---|---|",
        *(f"| {name} | {peak:,.0f} |" for name, peak in report["peak_memory_mib"].items()),
    ]
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    report = measure(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "rating_scale.json", report)
    markdown = as_markdown(report)
    write_text(args.output_dir / "rating_scale.md", markdown)
    print(markdown)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    main(parse_args())
