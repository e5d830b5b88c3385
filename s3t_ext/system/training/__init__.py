"""Nodes of one depth trained together, over one computed trunk, here or on a cluster."""
