"""Stand-ins for the world around EdgeGuard: real brokers on loopback, and fleets to talk to them."""
