"""The first half of expert_route: which experts a token takes, with which weights, and in which places they are."""
