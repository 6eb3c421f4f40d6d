"""Subclasses of TRL's trainers and configs: they fetch tensors, call `trl_ext.functional` and log."""
