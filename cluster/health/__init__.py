"""Is this node fit to train? Asked on every node before the ranks start; `python -m cluster.health --help`.

Nothing of ours is imported here, and torch only inside the checks that need it, so that a node can be judged when the
rest is broken.
"""
