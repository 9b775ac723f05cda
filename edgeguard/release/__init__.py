"""Signed releases: a TUF repository on the hub, and on the device a client that trusts nothing but its root.

``repository`` signs and stores, ``roles`` is what it reads and verifies, ``keys`` are what it signs with (hub and
operator); ``client`` holds the rules and starts a fetch (agent, light); ``fetch`` is the short-lived child that alone
imports TUF on a device.
"""

from __future__ import annotations
