"""``python -m benchmarks`` is the speed table; ``python -m benchmarks.quality`` is the quality table."""

from benchmarks.speed import main

raise SystemExit(main())
