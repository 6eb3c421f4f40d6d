"""Labels for the steps of sampled answers, without people: each prefix is rolled out and the right endings counted."""

from .config import LabelStepsConfig as LabelStepsConfig
from .run import label_steps as label_steps
