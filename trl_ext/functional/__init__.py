"""The mathematics: functions of tensors that know torch and nothing else."""

from .advantages import ADVANTAGE_ESTIMATORS as ADVANTAGE_ESTIMATORS
