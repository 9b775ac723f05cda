"""Where a device's inputs come from: a folder, a Unix socket, standard input, an MQTT topic, a camera.

One interface (:mod:`edgeguard.agent.sources.base`), one module each. No source ever makes the agent wait.
"""
