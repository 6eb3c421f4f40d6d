"""What commands of `trl-ext` run in the workers where TRL has no script of that name."""
