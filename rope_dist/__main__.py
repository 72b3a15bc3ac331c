"""``python -m rope_dist``."""

from .cli import main

raise SystemExit(main())
