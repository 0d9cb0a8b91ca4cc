"""Auto-Train-Once: an optimizer that prunes the network which it trains."""

from .checkpoint import load_pruned, save_pruned
from .optimizer import ATO
from .report import Report, Width

__all__ = ["ATO", "Report", "Width", "load_pruned", "save_pruned"]
__version__ = "0.1.0"
