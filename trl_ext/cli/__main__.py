"""`python -m trl_ext.cli`, which is `trl-ext`."""

from . import main

raise SystemExit(main())
