"""Is this model backdoored? Recovers triggers from a model and clean data, and judges them."""
