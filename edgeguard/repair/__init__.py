"""Removes a backdoor from a model, and lets nothing out that the gate has not passed."""
