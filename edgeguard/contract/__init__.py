"""What device, hub and files agree on: topics, wire messages, guard metadata, score histogram. No I/O here.

Everything that crosses a boundary is a frozen value that was checked when it was decoded. Nothing in this package
imports another part of EdgeGuard but ``edgeguard.errors``.
"""
