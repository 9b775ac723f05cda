"""What lies below the daemon on a board: its own telemetry, systemd, and the model slots.

Of ours it imports ``edgeguard.errors`` only.
"""

from __future__ import annotations
