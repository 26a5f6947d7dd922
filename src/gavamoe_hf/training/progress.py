"""What the trainers write while they run: a bar, and a line for each logging step in place of a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer

# Said by the bar, or of use to nobody who reads along
_LEFT_OUT = ("epoch", "num_tokens", "total_flos", "model_preparation_time", "entropy", "phase")
_LEFT_OUT_ENDS = ("_runtime", "_per_second", "_num_tokens", "_model_preparation_time", "_entropy")


def log_line(logs: Mapping[str, Any], step: int, max_steps: int) -> str:
    """Numbers of a logging step as `step 10/960, epoch 0.01: loss 5.376, nll 5.773`."""
    names = [name for name in logs if name not in _LEFT_OUT and not name.endswith(_LEFT_OUT_ENDS)]
    shown = ", ".join(f"{name} {logs[name]:.4g}" for name in names if isinstance(logs[name], int | float))
    epoch = f", epoch {logs['epoch']:.2f}" if "epoch" in logs else ""
    return f"{logs.get('phase', '')} step {step}/{max_steps}{epoch}: {shown}".strip()


class TidyProgressCallback(ProgressCallback):
    """transformers' bars, with a line for each logging step."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            self.training_bar.write(log_line(logs or {}, state.global_step, state.max_steps))


class TidyPrinterCallback(PrinterCallback):
    """The lines without the bars, for `disable_tqdm`."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_local_process_zero:
            print(log_line(logs or {}, state.global_step, state.max_steps))


def use_tidy_progress(trainer: Trainer) -> None:
    """Puts these in place of transformers' own; a notebook's table stays."""
    for own, tidy in ((ProgressCallback, TidyProgressCallback), (PrinterCallback, TidyPrinterCallback)):
        if trainer.pop_callback(own) is not None:
            trainer.add_callback(tidy)
