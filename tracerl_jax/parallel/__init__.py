"""Mesh, sharding rules and placement of arrays on many devices."""
