"""How any module is sharded, saved and moved between layouts. Knows modules and names, not DiTs."""
