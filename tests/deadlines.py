"""How long tests wait for what comes in its own time, on a busy machine too: only a test that fails waits so long."""

from __future__ import annotations

PATIENCE_S = 240.0
BEYOND_PATIENCE_S = 2 * PATIENCE_S      # for deadlines of what is under test, whose effect would come too late
