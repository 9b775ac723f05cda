"""The serial link between a gateway and its microcontrollers: messages, frames, and the C that speaks the same.

``messages`` is the one definition; ``codec`` puts messages into frames and back; ``c_source`` writes the C codec.
"""

from __future__ import annotations
