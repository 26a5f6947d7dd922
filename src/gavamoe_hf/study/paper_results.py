"""What the paper (arXiv 2410.11841, section 4) reports, to stand beside what is measured."""

from typing import Any

_COLUMNS = (
    *("bleu_1", "bleu_4", "rouge_1", "rouge_l", "distinct_1", "distinct_2"),
    *("bertscore_precision", "bertscore_recall", "bertscore_f1"),
)


def _row(*values: float) -> dict[str, float]:
    return dict(zip(_COLUMNS, values, strict=True))


# By the name of the data set in a study's configuration. BLEU, ROUGE and Distinct in percent, BERTScore from 0 to 1;
# rating and feature given
PAPER_RESULTS: dict[str, dict[str, Any]] = {
    "amazon": {
        "name": "Amazon Movies & TV",
        "data": {"users": 7506, "items": 7360, "records": 441_783, "features": 5399},
        "main": {
            "NETE": _row(14.965, 1.152, 16.470, 12.982, 14.503, 47.312, 0.344, 0.344, 0.344),
            "PETER": _row(14.796, 1.201, 15.335, 11.614, 17.431, 62.790, 0.384, 0.376, 0.380),
            "PEVAE": _row(16.349, 1.503, 19.255, 15.853, 18.440, 60.610, 0.349, 0.340, 0.345),
            "PEPLER": _row(12.564, 0.991, 14.005, 10.816, 17.134, 61.190, 0.369, 0.362, 0.364),
            "XRec": _row(20.259, 1.730, 24.971, 17.737, 20.370, 64.444, 0.409, 0.398, 0.401),
            "GaVaMoE": _row(21.370, 1.751, 25.445, 17.747, 21.254, 65.784, 0.416, 0.410, 0.412),
        },
        "gates": "The paper's table has K = 3 best, its text K = 2.",
    },
    "tripadvisor": {
        "name": "TripAdvisor",
        "data": {"users": 9765, "items": 6280, "records": 320_023, "features": 5069},
        "main": {
            "XRec": _row(19.642, 1.650, 23.672, 16.871, 21.113, 65.332, 0.386, 0.380, 0.384),
            "GaVaMoE": _row(21.142, 1.891, 25.465, 18.118, 22.784, 68.398, 0.397, 0.392, 0.394),
        },
        "gates": "The paper has K = 3 best.",
    },
    "yelp": {
        "name": "Yelp",
        "data": {"users": 27_147, "items": 20_266, "records": 1_293_247, "features": 7340},
        "main": {
            "XRec": _row(19.379, 1.601, 22.870, 16.531, 17.560, 61.190, 0.395, 0.351, 0.373),
            "GaVaMoE": _row(19.586, 1.616, 23.259, 17.416, 19.483, 63.847, 0.406, 0.374, 0.381),
        },
        "gates": "The paper has K = 3 best.",
    },
}
