"""The paper's whole study (section 4): its models over seeds, their scores, tables and figures."""

from .config import Cell, StudyConfig
from .report import write_report
from .runner import StudyData, cell_states, read_study_data, run_study

__all__ = [
    "Cell",
    "StudyConfig",
    "StudyData",
    "cell_states",
    "read_study_data",
    "run_study",
    "write_report",
]
