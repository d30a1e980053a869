"""How Ray must be told to behave: read by `haversack up`, which starts the controller with it.

These must be in the environment before `import ray`, in the driver and in every process below it,
so they are set by whoever spawns the controller.  Does not import Ray.
"""

from __future__ import annotations

from pathlib import Path

NAMESPACE = "haversack"
"""Ray namespace of all our actors."""

PLACEMENT_NAME = "placement"
"""Name of the placement actor in it."""

REPAIR_NAME = "repair"
"""Name of the repair actor in it."""


def ray_environment(token_file: Path) -> dict[str, str]:
    """Environment of a cell's Ray processes on one machine."""
    return {
        "RAY_USAGE_STATS_ENABLED": "0",
        # Everything binds to loopback, and only holders of the token are answered.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        # Workers would otherwise run at nice 15, behind everything else on the machine.
        "RAY_worker_niceness": "0",
        # Without these an idle cell spends CPU on metrics that nobody reads.
        "RAY_enable_metrics_collection": "0",
        "RAY_task_events_report_interval_ms": "0",
        "RAY_event_stats": "0",
        # A controller that outlives its GCS for a minute would be killed, and its actors with it.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "3600",
    }
