"""The hub: takes the devices' reports, adds up their evidence, opens cases, has models repaired, and rolls them out.

Pure modules decide (``ingest``, ``evidence``, ``policy``, ``cases``, ``rollout``); thin shells do the rest (``store``,
``listener``, ``worker``, ``web``, ``director``). Repairing runs in a child process, so that the hub itself never
imports a training framework.
"""
