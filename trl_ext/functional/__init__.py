"""Pure functions of tensors: torch and the standard library, no TRL, no processes, no state."""
