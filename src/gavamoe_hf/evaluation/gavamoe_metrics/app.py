"""The metrics as a page, of texts alone: paste predictions and references, a line each. To try it: python app.py"""

from pathlib import Path

import evaluate
import gradio as gr

from gavamoe_hf.evaluation import PROFILES

MODULE = str(Path(__file__).with_name("gavamoe_metrics.py"))


def compute(profile: str, predictions: str, references: str) -> dict:
    """Scores and their signatures."""
    texts = {"predictions": predictions.splitlines(), "references": references.splitlines()}
    if not texts["predictions"] or len(texts["predictions"]) != len(texts["references"]):
        counts = ", ".join(f"{len(lines)} {name}" for name, lines in texts.items())
        raise gr.Error(f"Expected a reference in the same line for each prediction, but got {counts}.")
    return evaluate.load(MODULE, profile).compute(**texts)


# `xrec` is BERTScore, which downloads an encoder
page = gr.Interface(
    compute,
    [
        gr.Dropdown([name for name in PROFILES if name != "xrec"], value="default", label="Profile"),
        gr.Textbox(label="Predictions, one a line", lines=5),
        gr.Textbox(label="References, one a line", lines=5),
    ],
    gr.JSON(label="Scores"),
    title="GaVaMoE metrics",
    flagging_mode="never",
)

if __name__ == "__main__":
    page.launch()
