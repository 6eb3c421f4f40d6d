"""Callbacks for any trainer of transformers: curves, metrics in a file, one line per log entry."""

from .curves import Curves as Curves
from .curves import curves_available as curves_available
from .curves import draw_curves as draw_curves
from .log_lines import LogLines as LogLines
from .metrics_file import MetricsFile as MetricsFile
