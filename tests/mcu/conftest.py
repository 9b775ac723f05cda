"""The models, the gateway and the board of the agent's tests, for those that need an emulator or a long time."""

from tests.agent.conftest import device, digit_models

__all__ = ["device", "digit_models"]
