"""`python -m moltron …` is the `moltron` program; torchrun starts this one."""

import sys

from moltron.cli.main import main

sys.exit(main())
